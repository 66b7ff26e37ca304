"""Who a host is, and what becomes of files that change under a running agent."""

from __future__ import annotations

import dataclasses
import datetime
import os
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.channel import authority, identity
from sami_plugin.channel.authority import Authority, write_file
from sami_plugin.channel.identity import Credentials, days_until, host_of, uri_of, uris_of, utc
from sami_plugin.channel.tls import Channel
from sami_plugin.errors import ConfigurationError, NotAuthorised, PeerError
from sami_plugin.testing.certificates import Certificates


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "pki")


def talks(caller: Credentials, called: Credentials) -> bool:
    """Whether the two can have a session."""
    ends = [
        Channel(called.host, lambda: caller.context(is_server=False), is_server=False),
        Channel(caller.host, lambda: called.context(is_server=True), is_server=True),
    ]
    ends[0].say(b"open")
    heard: list[bytes] = []
    try:
        for _ in range(4):
            for sender, receiver in (ends, ends[::-1]):
                for packet in sender.packets():
                    heard += receiver.take(packet)
    except PeerError:
        return False
    return heard == [b"open"]


@given(st.text(min_size=1, max_size=40).filter(lambda text: text.isprintable()))
def test_every_name_of_a_host_comes_back_from_its_uri(host: str) -> None:
    assert uri_of(host).isascii()
    assert host_of(["https://example.org/", uri_of(host)]) == host


@pytest.mark.parametrize(
    "uris",
    [[], ["https://a"], ["sami://"], ["sami://a", "sami://b"], ["SAMI://a"], ["sami://a/b"], ["sami://a%2"]],
)
def test_certificate_that_does_not_name_one_host_names_none(uris: list[str]) -> None:
    with pytest.raises(NotAuthorised, match="has to name one host"):
        host_of(uris)


def test_certificate_of_the_authority_names_the_host_for_as_long_as_was_asked(certificates: Certificates) -> None:
    found = Credentials("compute-1", certificates.files("compute-1", days=7)).certificate()
    assert uris_of(found) == ["sami://compute-1"]
    assert 6.9 < days_until(utc(found, "not_valid_after")) < 7
    assert utc(found, "not_valid_before") < datetime.datetime.now(datetime.UTC) - authority.SKEW / 2


def test_hosts_of_one_authority_talk_and_of_two_do_not(certificates: Certificates, tmp_path: Path) -> None:
    a, b = (Credentials(host, certificates.files(host)) for host in "ab")
    foreign = Credentials("b", Certificates(tmp_path / "other").files("b"))
    assert talks(a, b)
    assert not talks(a, foreign)
    assert not talks(foreign, a)


@pytest.mark.parametrize("spoil", ["certificate", "key", "authorities", "revoked"])
@pytest.mark.parametrize("how", ["missing", "junk", "empty"])
def test_file_that_is_no_use_is_named_with_its_option(certificates: Certificates, spoil: str, how: str) -> None:
    files = certificates.files("a")
    path: Path = getattr(files, spoil)
    path.unlink()
    if how != "missing":
        write_file(path, b"junk" if how == "junk" else b"", mode=0o600)
    with pytest.raises(ConfigurationError, match=rf"^\[tls\] (key|{spoil}): ") as caught:
        Credentials("a", files)
    assert str(path) in str(caught.value) or spoil == "certificate"


def test_certificate_of_another_host_is_refused_at_the_start(certificates: Certificates) -> None:
    with pytest.raises(ConfigurationError, match=r"is that of a, and \[agent\] host is b"):
        Credentials("b", certificates.files("a"))


def test_key_of_another_certificate_is_refused_at_the_start(certificates: Certificates) -> None:
    files = dataclasses.replace(certificates.files("a"), key=certificates.files("b").key)
    with pytest.raises(ConfigurationError, match=r"\[tls\] key: .*mismatch"):
        Credentials("a", files)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_key_that_others_may_read_is_refused_at_the_start(certificates: Certificates, mode: int) -> None:
    files = certificates.files("a")
    files.key.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        Credentials("a", files)


def aged(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """The authority's clock is so many days before ours."""
    then = datetime.datetime.now(datetime.UTC).replace(microsecond=0) - datetime.timedelta(days=days)
    monkeypatch.setattr(authority, "_now", lambda: then)


@pytest.mark.parametrize("days", [3, -3])
def test_certificate_out_of_date_is_refused_at_the_start_and_by_others(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    a, b = (Credentials(host, certificates.files(host)) for host in "ab")
    assert talks(a, b)
    aged(monkeypatch, days)
    files = certificates.files("a", days=2)
    with pytest.raises(ConfigurationError, match="which is not now"):
        Credentials("a", files)
    monkeypatch.setattr(Credentials, "check", lambda self: None)
    careless = object.__new__(Credentials)
    careless.__dict__.update(a.__dict__)
    careless._contexts = (careless._context(a._contexts[0].protocol), careless._context(a._contexts[1].protocol))
    careless._read_at = careless._stamp()
    assert not talks(careless, b)
    assert not talks(b, careless)


def test_clock_of_a_host_may_be_behind_by_less_than_an_hour(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    aged(monkeypatch, -0.9 / 24)
    Credentials("a", certificates.files("a"))
    aged(monkeypatch, -1.1 / 24)
    with pytest.raises(ConfigurationError, match="set this host's clock"):
        Credentials("a", certificates.files("a"))


def test_revoked_certificate_counts_no_more_where_the_list_is_in_place(certificates: Certificates) -> None:
    a, b = (Credentials(host, certificates.files(host)) for host in "ab")
    careless = Credentials("b", dataclasses.replace(b.files, revoked=None))
    assert talks(a, b)
    certificates.authority.revoke(one.serial for one in certificates.authority.issued() if one.host == "a")
    assert not talks(a, b), "the list was read again"
    assert talks(a, careless)
    renewed = Credentials("a", certificates.files("a"))
    assert talks(renewed, b)


def test_certificate_that_is_replaced_counts_at_once_and_one_that_does_not_fit_not(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = (Credentials(host, certificates.files(host)) for host in "ab")
    before = a.certificate().serial_number
    certificates.files("a")
    assert a.certificate().serial_number != before
    assert talks(a, b)
    caplog.clear()
    old = a.files.key.read_bytes()
    write_file(a.files.key, b"in the middle of a change", mode=0o600)
    assert talks(a, b)
    assert talks(a, b)
    assert len([one for one in caplog.records if "goes on to count" in one.message]) == 1
    write_file(a.files.key, old, mode=0o600)
    assert talks(a, b)


def test_key_that_others_could_read_counts_when_they_cannot_any_more(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """As the complaint asks for; nothing of the file changes but its mode."""
    a, b = (Credentials(host, certificates.files(host)) for host in "ab")
    before = a.context(is_server=False)
    certificates.files("a")
    a.files.key.chmod(0o644)
    assert a.context(is_server=False) is before
    assert "chmod 600" in caplog.text
    a.files.key.chmod(0o600)
    assert a.context(is_server=False) is not before
    assert talks(a, b)


def test_certificate_that_begins_to_count_later_is_taken_then(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a = Credentials("a", certificates.files("a"))
    before = a.context(is_server=False)
    certificates.files("a")
    monkeypatch.setattr(identity, "AGAIN_SECONDS", 0.0)
    with monkeypatch.context() as later:
        later.setattr(identity, "_now", lambda: datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1))
        for _ in range(3):
            assert a.context(is_server=False) is before
    assert len([one for one in caplog.records if "goes on to count" in one.message]) == 1
    assert a.context(is_server=False) is not before


def test_authority_is_not_replaced_and_tells_what_it_issued(tmp_path: Path) -> None:
    made = Authority.create(tmp_path, "cloud")
    with pytest.raises(ConfigurationError, match="has an authority already"):
        Authority.create(tmp_path, "cloud")
    assert os.stat(tmp_path / "ca.key").st_mode & 0o777 == 0o600
    for host in ("b", "a", "b"):
        made.issue(host)
    first = next(one for one in made.issued() if one.host == "b")
    made.revoke([first.serial])
    again = Authority(tmp_path)
    assert [(one.host, one.is_revoked) for one in again.issued()].count(("b", True)) == 1
    assert [one.host for one in again.issued()] == ["a", "b", "b"]
    again.revoke([one.serial for one in again.issued() if one.host == "a"])
    assert sum(one.is_revoked for one in Authority(tmp_path).issued()) == 2
    assert x509.load_pem_x509_crl((tmp_path / "crl.pem").read_bytes()).issuer.rfc4514_string() == "CN=cloud"


def test_authority_issues_nothing_that_outlives_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the authority itself ends"):
        Authority.create(tmp_path, "cloud", days=10).issue("a", days=11)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "ca.pem").unlink(), "sami pki init"),
        (lambda folder: (folder / "ca.key").write_bytes(b"junk"), "cannot be read"),
        (lambda folder: (folder / "crl.pem").write_bytes(b""), "cannot be read"),
        (lambda folder: (folder / "issued" / "x.pem").write_bytes(b"junk"), "remove it"),
    ],
)
def test_authority_that_is_spoiled_says_so(tmp_path: Path, spoil: object, words: str) -> None:
    Authority.create(tmp_path, "cloud")
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match=words):
        Authority(tmp_path).issued()


def test_serial_number_is_written_in_whole_octets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Authority.create(tmp_path, "cloud")
    monkeypatch.setattr(x509, "random_serial_number", lambda: 0xABC)
    made.issue("a")
    assert [one.serial for one in made.issued()] == ["0ABC"]
