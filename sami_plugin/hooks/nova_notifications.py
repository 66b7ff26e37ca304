"""Nova's notifications, where they are made: in nova-compute, which waits until sami-agent has been told.

    [oslo_messaging_notifications]
    driver = messagingv2
    driver = sami

    [sami]
    socket = /run/sami/agent.sock

The destination's nova-compute announces a guest before it plugs its ports, and so before libvirt hears of it: from
which host the guest comes, and which request moves it. This file lives in Nova's process and environment, often in a
container of their own: it imports the standard library and what oslo.messaging stands on, and all that it shares with
the agent is the socket. Whatever happens, it raises nothing and takes no longer than `MOST_SECONDS`: Nova goes on.
"""

import json
import logging
import socket
import time

from oslo_config import cfg
from oslo_messaging.notify import notifier

LOG = logging.getLogger(__name__)

MOST_SECONDS = 2.0
MOST_OCTETS = 4096
OPTIONS = [
    cfg.StrOpt(
        "socket", default="/run/sami/agent.sock", help="The unix socket of this host's sami-agent, as Nova sees it."
    )
]
ANNOUNCING = {
    # By event type, what publishes it and where its payload says which guest it is.
    "instance.live_migration_pre.start": ("nova-compute:", "uuid"),
    "compute.instance.live_migration.pre.start": ("compute.", "instance_id"),
}


class Driver(notifier.Driver):
    """The driver `sami` of oslo.messaging's notifier. Deaf to all but `ANNOUNCING`."""

    def __init__(self, conf, topics, transport):
        super().__init__(conf, topics, transport)
        conf.register_opts(OPTIONS, group="sami")

    def notify(self, ctxt, msg, priority, retry):
        """Never raises, whatever the message is."""
        try:
            announcement = announced_by(ctxt, msg)
            if announcement is not None:
                tell(self.conf.sami.socket, announcement)
        except Exception as error:  # noqa: BLE001 - Nova would log it as a fault of its own
            LOG.warning("sami-agent is not told of a live migration: %s: %s", type(error).__name__, error)


def announced_by(ctxt, msg):
    """What the agent is told of a notification of either format; None: nothing.

    :raises KeyError, TypeError, AttributeError: it is not what Nova makes.
    """
    if msg["event_type"] not in ANNOUNCING:
        return None
    publisher, guest = ANNOUNCING[msg["event_type"]]
    payload = msg["payload"].get("nova_object.data", msg["payload"])
    if not msg["publisher_id"].startswith(publisher):
        return None
    return {
        "request": "announce",
        "guest": payload[guest],
        "source": payload["host"],
        "destination": msg["publisher_id"][len(publisher) :],
        "request_id": payload.get("request_id") or (ctxt or {}).get("request_id") or "",
    }


def tell(path, announcement):
    """:raises OSError, ValueError: the agent cannot be reached, does not answer in time, or refuses, and says why."""
    deadline = time.monotonic() + MOST_SECONDS
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
        agent.settimeout(MOST_SECONDS)
        agent.connect(path)
        agent.sendall(json.dumps(announcement).encode() + b"\n")
        heard = b""
        while not heard.endswith(b"\n") and len(heard) < MOST_OCTETS:
            agent.settimeout(max(0.001, deadline - time.monotonic()))
            octets = agent.recv(MOST_OCTETS)
            if not octets:
                break
            heard += octets
    answer = json.loads(heard)
    if answer.get("answer") != "ok":
        raise ValueError(answer.get("reason"))
