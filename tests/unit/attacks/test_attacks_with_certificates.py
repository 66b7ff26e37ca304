"""Who has a certificate that does not count, or is another's. Each is tried without its defence too; see `trial`."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from sami_plugin.channel import authority
from sami_plugin.channel.identity import Credentials
from sami_plugin.channel.tls import Channel
from sami_plugin.errors import NotAuthorised, StreamBroken
from sami_plugin.testing.certificates import Certificates
from tests.unit.attacks.trial import believe_any_name, both
from tests.unit.channel.pair import Pair

NO_CHECK_TIME = ssl.VerifyFlags(0x200000)  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "certificates")


def speaks(caller: ssl.SSLContext, called: ssl.SSLContext) -> bool:
    """Whether the called host hears what is said by who calls."""
    pair = Pair(
        Channel("s", lambda: caller, is_server=False),
        Channel("d", lambda: called, is_server=True),
    )
    pair.say("d", b"open")
    try:
        pair.carry_all()
    except (NotAuthorised, StreamBroken):
        return False
    return pair.heard["s"] == [b"open"]


def of(certificates: Certificates, host: str, *, is_server: bool) -> ssl.SSLContext:
    return Credentials(host, certificates.files(host)).context(is_server=is_server)


def tried(
    monkeypatch: pytest.MonkeyPatch, caller: ssl.SSLContext, called: ssl.SSLContext, take_out: Callable[[], None]
) -> None:
    both(monkeypatch, lambda: speaks(caller, called), take_out)


@pytest.mark.parametrize("days", [3, -3], ids=["ended", "not-yet"])
def test_certificate_that_does_not_count_now(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    called = of(certificates, "s", is_server=True)
    then = datetime.datetime.now(datetime.UTC).replace(microsecond=0) - datetime.timedelta(days=days)
    with monkeypatch.context() as patch:
        patch.setattr(authority, "_now", lambda: then)
        files = certificates.files("d")
    caller = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # who attacks does not look at his own
    caller.check_hostname = False
    caller.load_cert_chain(files.certificate, files.key)
    caller.load_verify_locations(files.authorities)

    def take_out() -> None:
        called.verify_flags |= NO_CHECK_TIME

    tried(monkeypatch, caller, called, take_out)


def test_certificate_that_was_revoked(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = of(certificates, "d", is_server=False)
    certificates.authority.revoke(one.serial for one in certificates.authority.issued())
    called = of(certificates, "s", is_server=True)
    caller.verify_flags &= ~ssl.VERIFY_CRL_CHECK_LEAF

    def take_out() -> None:
        called.verify_flags &= ~ssl.VERIFY_CRL_CHECK_LEAF

    tried(monkeypatch, caller, called, take_out)


def test_certificate_of_another_authority(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = Certificates(tmp_path / "foreign")
    caller, called = of(foreign, "d", is_server=False), of(certificates, "s", is_server=True)
    caller.load_verify_locations(certificates.folder / "ca.pem")
    caller.verify_flags &= ~ssl.VERIFY_CRL_CHECK_LEAF

    def take_out() -> None:
        called.load_verify_locations(foreign.folder / "ca.pem")
        called.verify_flags &= ~ssl.VERIFY_CRL_CHECK_LEAF

    tried(monkeypatch, caller, called, take_out)


def test_host_that_is_not_the_source_answers(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {host: Credentials(host, certificates.files(host)) for host in "dx"}

    def attack() -> bool:
        pair = Pair.of(made.__getitem__, called="x")
        pair.say("d", b"open")
        pair.say("s", b"offer")
        try:
            pair.carry_all()
        except NotAuthorised:
            return False
        return pair.heard["d"] == [b"offer"]

    both(monkeypatch, attack, lambda: believe_any_name(monkeypatch))
