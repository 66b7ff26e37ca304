"""The demo's migrations where the kernel gives no namespaces: firewalls in memory, and no packet at all.

The agents, the decisions, the representation and the journal are the real ones. Instead of bytes that arrive, a run
says whether the destination's firewall knows the connection when the guest runs there; without that it would be
dropped, as the demo on a real kernel shows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from lab.deadline import wait_until
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.model.flows import TEMPLATES, Batch, FlowStatus, ZoneRole
from sami_plugin.model.migration import Phase
from sami_plugin.model.protocols import TcpState
from sami_plugin.testing.hosts import Hosts, new_guest

LABEL = "memory driver: no kernel, no packets"
ADDRESSES = {4: "192.0.2.7", 6: "2001:db8::7"}
CROWD = 2000
ZONES = {"a": 4097, "b": 5201}


def run(letter: str, hops: Sequence[str], *, with_sami: bool) -> dict[str, Any]:
    """One case of the demo; `survived` says whether the firewall knew the connection after every move."""
    family = 6 if letter == "f" else 4
    flows = _flows(family, CROWD if letter == "e" else 1)
    with (
        tempfile.TemporaryDirectory() as folder,
        Hosts(Path(folder), ("a", "b"), lambda name: MemoryDriver(MemoryDevice(name))) as hosts,
    ):
        guest = new_guest()
        hosts.plug(hops[0], guest, ZONES[hops[0]], ADDRESSES[family])
        hosts.drivers[hops[0]].insert(hosts.scope(hops[0], guest), flows)
        is_known = True
        counts: dict[str, int] = {}
        for source, destination in pairwise(hops):
            if with_sami:
                hosts.say(source, Phase.OUTGOING, guest)
                hosts.say(destination, Phase.PREPARE, guest, source)
            hosts.plug(destination, guest, ZONES[destination], ADDRESSES[family])
            if with_sami:
                hosts.say(destination, Phase.STARTED, guest)
                wait_until(partial(hosts.has_step, destination, guest, "in sync"), "the first export to be over", 20)
                hosts.say(source, Phase.SUSPENDED, guest)
            hosts.unplug(source, guest)
            if with_sami:
                hosts.say(destination, Phase.RESUMED, guest)
                hosts.say(source, Phase.STOPPED, guest)
                for host in (source, destination):
                    wait_until(lambda host=host: hosts.agents[host].wait_until_idle(0.1), "the sessions to end", 30)
                here, there = hosts.reports(source, guest)[0], hosts.reports(destination, guest)[0]
                for part in (here["flows"], there["flows"]):
                    for name, count in part.items():
                        counts[name] = counts.get(name, 0) + count
            known = hosts.drivers[destination].read_back(hosts.scope(destination, guest), flows)[1]
            is_known = is_known and bool(known.all())
        return {"survived": is_known, "flows": counts}


def show(cases: dict[str, tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """Runs the cases (letter to title and hops), prints a table; the result in the form of the demo's result.json."""
    print(f"\nThe same migrations with the {LABEL}")
    print(f"{'case':60}{'without SAMI':20}{'with SAMI':20}")
    rows = []
    for letter, (title, hops) in cases.items():
        if letter == "e":
            title = f"as a, among {CROWD:,} flows"  # entries in memory are objects: fewer of them
        sides = {side: run(letter, hops, with_sami=side == "with") for side in ("without", "with")}
        words = {side: "known to the firewall" if made["survived"] else "unknown" for side, made in sides.items()}
        print(f"({letter}) {title:56}{words['without']:20}{words['with']:20}")
        rows.append({"name": letter, "title": title, **sides})
    return {"label": LABEL, "cases": rows}


def _flows(family: int, count: int) -> Batch:
    template = TEMPLATES[f"tcp-ipv{family}"]
    rows = template.empty(count)
    rows["zoneRole"], rows["protocolIdentifier"] = ZoneRole.PORT, 6
    if family == 4:
        rows["sourceIPv4Address"], rows["destinationIPv4Address"] = 0xC0000207, 0xC6336401
    else:
        rows["sourceIPv6Address"] = (0x20010DB800000000, 7)
        rows["destinationIPv6Address"] = (0x20010DB800000000, 0xFE)
    rows["sourceTransportPort"] = range(1024, 1024 + count)
    rows["destinationTransportPort"] = 443
    rows["conntrackStatus"] = FlowStatus.CONFIRMED | FlowStatus.SEEN_REPLY | FlowStatus.ASSURED
    rows["remainingTimeoutSeconds"] = 432000
    rows["tcpConnectionState"] = TcpState.ESTABLISHED
    return Batch(template, rows)
