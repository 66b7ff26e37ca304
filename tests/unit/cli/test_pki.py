"""`sami pki` from the authority to a host that was revoked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sami_plugin.channel.identity import Credentials
from sami_plugin.cli import checks, configuration
from sami_plugin.cli.checks import Result
from sami_plugin.model.settings import Files
from tests.unit.cli.command_line import CommandLine


@pytest.fixture
def folder(sami: CommandLine, tmp_path: Path) -> Path:
    assert sami("pki", "init", "--folder", tmp_path / "pki", "--name", "cloud") == 0, sami.err
    return tmp_path / "pki"


def listed(sami: CommandLine, folder: Path, *more: object) -> list[dict[str, object]]:
    assert sami("pki", "show", "--folder", folder, "-f", "json", *more) == 0, sami.err
    found: list[dict[str, object]] = json.loads(sami.out)
    return found


def test_host_that_was_issued_a_certificate_can_use_it(sami: CommandLine, folder: Path, tmp_path: Path) -> None:
    assert sami("pki", "issue", "--folder", folder, "--output", tmp_path, "compute-1", "--days", 100) == 0, sami.err
    assert "move the key" in sami.out
    assert os.stat(tmp_path / "compute-1.key").st_mode & 0o777 == 0o600
    files = Files(tmp_path / "compute-1.pem", tmp_path / "compute-1.key", folder / "ca.pem", folder / "crl.pem")
    Credentials("compute-1", files)
    (one,) = listed(sami, folder)
    assert (one["Host"], one["State"], one["Days left"]) == ("compute-1", "valid", 99)


def test_host_may_be_called_as_in_nova(sami: CommandLine, folder: Path, tmp_path: Path) -> None:
    """Which takes an underscore."""
    name = "compute_1.rack-2"
    assert sami("pki", "issue", "--folder", folder, "--output", tmp_path, name) == 0, sami.err
    files = Files(tmp_path / f"{name}.pem", tmp_path / f"{name}.key", folder / "ca.pem", folder / "crl.pem")
    Credentials(name, files)
    conf = tmp_path / "agent.conf"
    conf.write_text(f"[agent]\nhost = {name}\n")
    assert configuration.load([str(conf)]).host == name


def test_certificate_is_renewed_and_the_one_before_counts_until_it_is_revoked(
    sami: CommandLine, folder: Path, tmp_path: Path
) -> None:
    issue = ("pki", "issue", "--folder", folder, "--output", tmp_path, "a")
    assert sami(*issue) == 0
    assert sami(*issue) == 1
    assert "has a certificate that counts" in sami.err
    assert sami("pki", "renew", "--folder", folder, "--output", tmp_path, "a", "--days", 700) == 0, sami.err
    old, new = listed(sami, folder)
    assert sami("pki", "revoke", "--folder", folder, "--serial", old["Serial"]) == 0, sami.err
    assert "crl.pem" in sami.out
    assert [one["State"] for one in listed(sami, folder, "a")] == ["revoked", "valid"]
    assert sami("pki", "revoke", "--folder", folder, "a") == 0
    assert {one["State"] for one in listed(sami, folder)} == {"revoked"}
    assert new["Serial"] in sami.out
    assert sami(*issue) == 0, "a host that was revoked may have another one"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("issue", "../a"), "is no name that [agent] host takes"),
        (("issue", "bad host"), "is no name that [agent] host takes"),
        (("issue", ""), "is no name that [agent] host takes"),
        (("issue", "a", "--output", "/nowhere"), "there is no such folder"),
        (("issue", "a", "--days", "99999"), "the authority itself ends"),
        (("renew", "a"), "never had a certificate"),
        (("revoke", "a"), "has no certificate"),
        (("revoke",), "name a host"),
        (("revoke", "a", "--serial", "1"), "name a host"),
        (("init",), "has an authority already"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    sami: CommandLine, folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    days = ("--days", "36000") if "99999" in arguments else ()
    given = tuple(one for one in arguments if one not in ("--days", "99999"))
    assert sami("pki", given[0], "--folder", folder, *given[1:], *days) == 1
    assert words in sami.err
    assert sami.err.count("\n") == 1


def test_authority_that_is_not_there_is_named_with_what_makes_one(sami: CommandLine, tmp_path: Path) -> None:
    assert sami("pki", "show", "--folder", tmp_path) == 1
    assert "sami pki init" in sami.err


def configured(tmp_path: Path, **tls: object) -> list[str]:
    path = tmp_path / "sami-agent.conf"
    lines = [f"{option} = {value}" for option, value in tls.items()]
    path.write_text("\n".join(["[agent]", "host = a", "[tls]", *lines, ""]))
    return [str(path)]


@pytest.mark.parametrize(
    ("days", "left_out", "result", "words"),
    [
        (100, "", Result.OK, "counts for 99 days more"),
        (20, "", Result.LIMITED, "counts for 19 days more"),
        (100, "revoked", Result.LIMITED, "no list of revoked ones"),
        (100, "key", Result.MISSING, "[tls] key: /nowhere"),
    ],
)
def test_doctor_tells_of_the_certificate_before_it_hurts(
    sami: CommandLine, folder: Path, tmp_path: Path, days: int, left_out: str, result: Result, words: str
) -> None:
    assert sami("pki", "issue", "--folder", folder, "--output", tmp_path, "a", "--days", days) == 0, sami.err
    tls = {
        "certificate": tmp_path / "a.pem",
        "key": tmp_path / "a.key",
        "authorities": folder / "ca.pem",
        "revoked": folder / "crl.pem",
    }
    if left_out:
        tls[left_out] = Path("/nowhere") if left_out == "key" else ""  # type: ignore[assignment]
    files = configured(tmp_path, **tls)
    (found,) = [one for one in checks._configured(files) if one.name == "certificate"]
    assert (found.result, words in found.reason) == (result, True), found
