"""A distribution with entry points that do not load, as pip would leave it."""

from __future__ import annotations

from pathlib import Path

import pytest
from stevedore.driver import DriverManager


def install_broken(folder: Path, monkeypatch: pytest.MonkeyPatch, namespace: str) -> None:
    """From here on there is `broken` in that namespace of entry points; its module imports what is not there."""
    (folder / "sami_broken.py").write_text("import none_such\n")
    info = folder / "sami_broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sami-broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{namespace}]\nbroken = sami_broken:Plugin\n")
    monkeypatch.syspath_prepend(str(folder))
    # stevedore keeps what it found, in the process and on disk.
    monkeypatch.setattr(DriverManager, "ENTRY_POINT_CACHE", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
