"""The page of attacks and the tests that it names."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "doc/source/user/attacks.rst").read_text()


def test_page_names_every_attack_s_test_and_no_other() -> None:
    named = set(re.findall(r"``(test_\w+)``", PAGE))
    tests = "".join(path.read_text() for path in (ROOT / "tests/unit/attacks").glob("test_attacks*.py"))
    attacks = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    missing = attacks - named - {"test_after_a_flood_a_host_is_heard_again"}
    assert not missing
    assert not named - attacks
