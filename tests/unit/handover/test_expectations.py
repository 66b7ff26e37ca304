"""What is expected travels behind its master, only where it leads to the guest, and only to who can read it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sami_plugin.arriving import Carried
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.handover.destination import _masters_first
from sami_plugin.model.flows import TEMPLATES, is_expected_behind_another, is_expected_elsewhere
from sami_plugin.model.results import WORDS, Reason
from sami_plugin.testing.conformance import NEIGHBOUR_ADDRESSES, PORT_ADDRESSES, flows
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.memory import SETTINGS, ZONES, begin, finish, guest_with_flows, until_idle

ALL = frozenset(TEMPLATES)
EXPECTED = [template for template in TEMPLATES.values() if template.is_expectation]


def test_masters_come_before_what_was_and_what_is_expected_of_them() -> None:
    udp, tcp = flows(TEMPLATES["udp-extended-ipv4"], 2), flows(TEMPLATES["tcp-extended-ipv4"], 1)
    udp.rows["masterProtocolIdentifier"][0] = 6
    expected, usual = flows(TEMPLATES["udp-expectation-ipv4"], 1), flows(TEMPLATES["udp-ipv4"], 1)
    ordered = _masters_first([Carried(one, one) for one in (expected, udp, tcp, usual)])
    told = [(one.batch.template.name, one.batch.rows["flowId"].tolist()) for one in ordered]
    assert told == [
        ("udp-extended-ipv4", [2]),
        ("tcp-extended-ipv4", [1]),
        ("udp-ipv4", [1]),
        ("udp-extended-ipv4", [1]),
        ("udp-expectation-ipv4", [1]),
    ]
    assert all(one.came.rows.tobytes() == one.batch.rows.tobytes() for one in ordered)


def test_what_is_expected_leads_to_the_guest_or_to_an_end_of_its_master() -> None:
    for template in EXPECTED:
        batch = flows(template, 4)
        family = "IPv6" if template.is_ipv6 else "IPv4"
        to, nat = batch.destination_field, f"expectationNat{family}Address"
        batch.rows["expectationNatDirection"] = 1
        own = flows(template, 1).rows[batch.source_field][0]
        neighbour = flows(template, 1, source=NEIGHBOUR_ADDRESSES).rows[batch.source_field][0]
        for field in (to, nat):
            batch.rows[field][0], batch.rows[field][1] = own, batch.rows[f"masterDestination{family}Address"][1]
            batch.rows[field][2:] = neighbour
        batch.rows["expectationNatDirection"][3] = 0
        assert is_expected_elsewhere(batch, PORT_ADDRESSES).tolist() == [False, False, True, True]
        assert is_expected_behind_another(batch, PORT_ADDRESSES).tolist() == [False, False, True, False]


def test_what_is_expected_is_not_sent_to_who_cannot_read_it(tmp_path: Path) -> None:
    """Agents of before refuse all of a payload that holds it."""
    devices = {name: MemoryDevice(name) for name in ZONES}

    def made(name: str) -> MemoryDriver:
        return MemoryDriver(devices[name], templates=ALL if name == "host-a" else None)

    with Hosts(tmp_path, tuple(ZONES), made, settings=SETTINGS) as hosts:
        guest = guest_with_flows(hosts, 3)
        scope = hosts.scope("host-a", guest)
        expected = flows(TEMPLATES["tcp-expectation-ipv4"], 1, source=scope.addresses, first=500)
        assert hosts.drivers["host-a"].insert(scope, expected)["outcome"].tolist() == [0]
        begin(hosts, guest)
        finish(hosts, guest)
        until_idle(hosts)
        source = hosts.reports("host-a", guest)[0]
        assert source["flows"]["exported"] == 3
        assert source["named"][f"not exported: {WORDS[Reason.NOT_DECLARED]}"]["count"] == 1
        assert not np.any(hosts.drivers["host-a"].read_back(scope, expected)[1]), "it is purged all the same"
