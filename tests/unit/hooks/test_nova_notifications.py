"""The driver that Nova loads, in oslo.messaging's own notifier, beside an agent's socket."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg
from oslo_context.context import RequestContext

from sami_plugin.errors import OperatorError
from sami_plugin.hooks import nova_notifications
from sami_plugin.hooks.local_socket import LocalSocket, guest_of, text_of

GUEST = "6ac30000-0000-4000-8000-000000000001"
REQUEST = "req-5f2d0c2e-4d0a-4f7b-9d5e-1c5a7f3b9e42"
ANNOUNCED = {"guest": GUEST, "source": "compute-1", "destination": "compute-2", "request_id": REQUEST}
VERSIONED = {
    "nova_object.name": "InstanceActionPayload",
    "nova_object.namespace": "nova",
    "nova_object.version": "1.8",
    "nova_object.data": {"uuid": GUEST, "host": "compute-1", "request_id": REQUEST, "task_state": "migrating"},
}
LEGACY = {"instance_id": GUEST, "host": "compute-1", "state": "active", "fixed_ips": []}
NOTIFIED = {
    "versioned": ("nova-compute:compute-2", "instance.live_migration_pre.start", VERSIONED),
    "legacy": ("compute.compute-2", "compute.instance.live_migration.pre.start", LEGACY),
}
OTHERS = {
    "a later one": ("nova-compute:compute-2", "instance.live_migration_post_dest.end", VERSIONED),
    "another service's": ("nova-conductor:controller", "instance.live_migration_pre.start", VERSIONED),
    "another action's": ("nova-compute:compute-2", "instance.delete.start", VERSIONED),
    "the other format's publisher": ("compute.compute-2", "instance.live_migration_pre.start", VERSIONED),
    "one that says nothing": ("nova-compute:compute-2", "instance.live_migration_pre.start", {}),
    "one that is no object": ("nova-compute:compute-2", "instance.live_migration_pre.start", {"nova_object.data": 7}),
}


class AsNova(oslo_messaging.NoOpSerializer):  # type: ignore[misc]
    """What Nova's serializer makes of a context."""

    def serialize_context(self, ctxt: RequestContext) -> dict[str, Any]:
        return dict(ctxt.to_dict())


class Heard(list[dict[str, Any]]):
    """What an agent's socket was told."""

    def announce(self, said: Any) -> None:
        guest_of(said)
        self.append({field: text_of(said, field) for field in ANNOUNCED})
        if said["source"] == "compute-x":
            raise OperatorError("source: there is no such host")


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[Heard]:
    heard = Heard()
    agent = LocalSocket(tmp_path / "agent.sock", lambda event: None, requests={"announce": heard.announce})
    agent.start()
    yield heard
    agent.stop()


def notify(path: Path, publisher: str, event: str, payload: dict[str, Any]) -> None:
    """As Nova does it: by a notifier with the driver that stevedore finds."""
    conf = cfg.ConfigOpts()
    conf([])
    transport = oslo_messaging.get_notification_transport(conf, url="fake://")
    conf.register_opts(nova_notifications.OPTIONS, group="sami")
    conf.set_override("socket", str(path), group="sami")
    notifier = oslo_messaging.Notifier(
        transport, publisher, driver="sami", topics=["notifications"], serializer=AsNova()
    )
    notifier.info(RequestContext(request_id=REQUEST), event, payload)


@pytest.mark.parametrize("form", NOTIFIED)
def test_agent_is_told_where_the_guest_comes_from_and_which_request_moves_it(
    tmp_path: Path, heard: Heard, form: str
) -> None:
    notify(tmp_path / "agent.sock", *NOTIFIED[form])
    assert heard == [ANNOUNCED]


@pytest.mark.parametrize("what", OTHERS)
def test_nothing_else_is_told(tmp_path: Path, heard: Heard, what: str) -> None:
    notify(tmp_path / "agent.sock", *OTHERS[what])
    assert heard == []


def test_without_an_agent_nova_goes_on_and_its_log_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notify(tmp_path / "nobody.sock", *NOTIFIED["versioned"])
    assert "sami-agent is not told of a live migration: FileNotFoundError" in caplog.text


def test_agent_that_refuses_is_heard(tmp_path: Path, heard: Heard, caplog: pytest.LogCaptureFixture) -> None:
    notify(tmp_path / "agent.sock", "compute.compute-2", NOTIFIED["legacy"][1], {**LEGACY, "host": "compute-x"})
    assert "ValueError: source: there is no such host" in caplog.text


def test_agent_that_does_not_answer_holds_nova_up_for_a_moment_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "deaf.sock"))
        deaf.listen()
        began = time.monotonic()
        notify(tmp_path / "deaf.sock", *NOTIFIED["versioned"])
        assert time.monotonic() - began < nova_notifications.MOST_SECONDS + 2
    assert "TimeoutError" in caplog.text


IN_A_PROCESS_OF_ITS_OWN = """
import sys
if sys.argv[1] == "eventlet":
    import eventlet
    eventlet.monkey_patch()
from sami_plugin.hooks import nova_notifications
ours = sorted(one for one in sys.modules if one.startswith("sami_plugin"))
assert ours == ["sami_plugin", "sami_plugin.hooks", "sami_plugin.hooks.nova_notifications"], ours
import json
nova_notifications.tell(sys.argv[2], json.loads(sys.argv[3]))
"""


@pytest.mark.parametrize("threads", ["eventlet", "native"])
def test_it_brings_nothing_else_of_ours_into_nova_and_works_with_either_kind_of_threads(
    tmp_path: Path, heard: Heard, threads: str
) -> None:
    told = {"request": "announce", **ANNOUNCED}
    words = [sys.executable, "-W", "ignore", "-c", IN_A_PROCESS_OF_ITS_OWN, threads]
    subprocess.run([*words, str(tmp_path / "agent.sock"), json.dumps(told)], check=True, timeout=60)
    assert heard == [ANNOUNCED]
