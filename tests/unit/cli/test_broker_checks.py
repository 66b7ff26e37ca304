"""What the doctor makes of brokers."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from sami_plugin.cli import broker_checks, configuration
from sami_plugin.cli.checks import Check, Result
from sami_plugin.testing.certificates import Certificates
from tests.unit.cli.broker import AMQP_START, Broker


def tried(url: str, *, is_tls: bool = False) -> Check:
    return broker_checks.broker(url, is_tls=is_tls)


@pytest.fixture
def stranger() -> Iterator[Broker]:
    made = Broker(b"HTTP/1.1")
    yield made
    made.close()


@pytest.fixture
def tls_broker(tmp_path: Path) -> Iterator[Broker]:
    files = Certificates(tmp_path).files("broker")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    made = Broker(AMQP_START, context)
    yield made
    made.close()


def test_broker_that_speaks_amqp_is_ok(broker: Broker) -> None:
    assert tried(f"rabbit://u:secret@127.0.0.1:{broker.port}/").result is Result.OK


def test_broker_that_speaks_something_else_is_missing(stranger: Broker, broker: Broker) -> None:
    found = tried(f"rabbit://u:secret@127.0.0.1:{stranger.port}/")
    assert (found.result, "AMQP" in found.reason) == (Result.MISSING, True)
    both = f"rabbit://u:p@127.0.0.1:{stranger.port},u:p@127.0.0.1:{broker.port}/"
    assert tried(both).result is Result.LIMITED


@pytest.mark.parametrize(
    ("url", "result", "said"),
    [
        ("rabbit://", Result.MISSING, "names no broker"),
        ("kafka://u:secret@127.0.0.1/", Result.MISSING, "not supported"),
        ("rabbit://u:secret@127.0.0.1:1/", Result.MISSING, "refused"),
        ("rabbit://u:secret@127.0.0.1:port/", Result.MISSING, "transport_url"),
        ("fake://", Result.LIMITED, "for tests"),
    ],
)
def test_broker_that_cannot_be_used_is_told_without_its_password(url: str, result: Result, said: str) -> None:
    found = tried(url)
    assert found.result is result
    assert said in found.reason
    assert "secret" not in found.reason
    assert found.mend


def test_broker_behind_tls_is_spoken_to_through_tls(tls_broker: Broker, broker: Broker) -> None:
    url = f"rabbit://u:secret@127.0.0.1:{tls_broker.port}/sami"
    found = tried(f"{url}?ssl=1")
    assert (found.result, "AMQP through TLS" in found.reason) == (Result.OK, True)
    assert tried(url, is_tls=True).result is Result.OK
    assert tried(f"{url}?ssl=0", is_tls=True).result is Result.MISSING
    assert tried(url).result is Result.MISSING
    plain = tried(f"rabbit://u:secret@127.0.0.1:{broker.port}/?ssl=1")
    assert (plain.result, "no TLS" in plain.reason) == (Result.MISSING, True)
    assert "secret" not in plain.reason
    assert "perhaps" in tried(f"{url}?ssl=perhaps").reason


@pytest.mark.parametrize("is_tls", [True, False])
def test_configuration_says_whether_the_broker_has_tls(tmp_path: Path, is_tls: bool) -> None:
    path = tmp_path / "agent.conf"
    path.write_text(f"[oslo_messaging_rabbit]\nssl = {is_tls}\n")
    assert configuration.load([str(path)]).is_broker_tls is is_tls
