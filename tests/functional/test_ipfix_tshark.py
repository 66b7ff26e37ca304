"""An outside judge: Wireshark's dissector reads every record of an exported file, and reads what was written."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta

import netaddr
import numpy as np
import pytest

from sami_plugin.codec import ipfix_file
from sami_plugin.model import information_elements as elements
from sami_plugin.model.flows import TEMPLATES, Batch, FirewallEvent, Template
from sami_plugin.testing.conformance import flows

NOW = 1_700_000_000
# More than fit into one message of the widest template, so that batches are divided.
COUNT = 700

DISSECTED = {
    "protocolIdentifier": "cflow.protocol",
    "sourceIPv4Address": "cflow.srcaddr",
    "destinationIPv4Address": "cflow.dstaddr",
    "sourceIPv6Address": "cflow.srcaddrv6",
    "destinationIPv6Address": "cflow.dstaddrv6",
    "sourceTransportPort": "cflow.srcport",
    "destinationTransportPort": "cflow.dstport",
    "icmpTypeIPv4": "cflow.icmp_ipv4_type",
    "icmpCodeIPv4": "cflow.icmp_ipv4_code",
    "icmpTypeIPv6": "cflow.icmp_ipv6_type",
    "icmpCodeIPv6": "cflow.icmp_ipv6_code",
    "flowId": "cflow.flow_id",
    "firewallEvent": "cflow.firewall_event",
    "tcpWindowScale": "cflow.tcp_window_scale",
    "reverseTcpWindowScale": "cflow.tcp_window_scale",
    "postNATSourceIPv4Address": "cflow.post_natsource_ipv4_address",
    "postNATDestinationIPv4Address": "cflow.post_natdestination_ipv4_address",
    "postNATSourceIPv6Address": "cflow.post_nat_source_ipv6_address",
    "postNATDestinationIPv6Address": "cflow.post_nat_destination_ipv6_address",
    "postNAPTSourceTransportPort": "cflow.post_naptsource_transport_port",
    "postNAPTDestinationTransportPort": "cflow.post_naptdestination_transport_port",
    "octetTotalCount": "cflow.permanent_octets",
    "packetTotalCount": "cflow.permanent_packets",
    "reverseOctetTotalCount": "cflow.permanent_octets",
    "reversePacketTotalCount": "cflow.permanent_packets",
    "flowStartMilliseconds": "cflow.abstimestart",
}
PRIVATE = "cflow.enterprise_private_entry"

pytestmark = pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed (Debian: tshark)")


def tshark(path: pathlib.Path, *arguments: str) -> str:
    command = ["tshark", "-n", "-r", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout


def written() -> list[Batch]:
    batches = []
    for template in TEMPLATES.values():
        batch = flows(template, COUNT)
        if template.is_flow:
            batch.rows["conntrackStatus"] |= np.uint32(0x8000)
        batch.rows["flowId"] += np.uint32(0xFFFF0000)
        names = batch.take(np.arange(3)).identities
        names.rows["firewallEvent"] = FirewallEvent.DELETED
        batches += [batch, names]
    return batches


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("ipfix") / "flows.ipfix"
    ipfix_file.write(made, written(), export_time=NOW)
    return made


@functools.cache
def _columns(template: Template) -> tuple[tuple[str, str], ...]:
    return tuple((field, DISSECTED.get(field, PRIVATE)) for field in template.dtype.names or ())


def expected(batch: Batch) -> list[list[tuple[str, str]]]:
    made = []
    for row in batch.rows:
        octets = row.tobytes()
        record = []
        for field, name in _columns(batch.template):
            dtype, offset = (batch.rows.dtype.fields or {})[field][:2]
            value = octets[offset : offset + dtype.itemsize]
            number = int.from_bytes(value, "big")
            if name == PRIVATE:
                said = value.hex(":")
            elif "Address" in field:
                said = str(netaddr.IPAddress(number, 6 if dtype.itemsize == 16 else 4))
            elif field == "flowStartMilliseconds":
                moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=number)
                said = f"{moment:%b %d, %Y %H:%M:%S.%f}000 UTC"
            else:
                said = str(number)
            record.append((name, said))
        made.append(record)
    return made


def test_every_record_is_dissected_as_it_was_written(path: pathlib.Path) -> None:
    frames = json.loads(tshark(path, "-T", "json"), object_pairs_hook=list)
    found: list[list[tuple[str, str]]] = []

    def walk(pairs: object) -> None:
        if not isinstance(pairs, list):
            return
        for pair in pairs:
            if isinstance(pair, list):
                walk(pair)
            elif isinstance(pair, tuple):
                name, value = pair
                if re.fullmatch(r"Flow \d+", name):
                    found.append([(key, said) for key, said in value if isinstance(said, str)])
                else:
                    walk(value)

    walk(frames)
    assert found == [record for batch in written() for record in expected(batch)]


def test_dissector_finds_nothing_malformed(path: pathlib.Path) -> None:
    assert tshark(path, "-Y", "_ws.malformed || _ws.expert") == ""
    assert len(tshark(path, "-T", "fields", "-e", "frame.number").split()) > 2 * len(TEMPLATES)


def test_sequence_numbers_count_as_the_dissector_counts(path: pathlib.Path) -> None:
    told = tshark(path, "-T", "fields", "-e", "cflow.sequence").split()
    assert told[0] == "0"
    assert told == sorted(told, key=int)
    # Wireshark adds an expert item of its own where the number is not what it has counted to.
    assert "cflow.sequence_analysis" not in tshark(path, "-V")
    assert "Expected sequence" not in tshark(path, "-V")


def test_elements_of_ours_are_named_by_the_file(path: pathlib.Path) -> None:
    said = tshark(path, "-T", "fields", "-E", "occurrence=a", "-e", "cflow.information_element_name", "-c", "1")
    ours = [each.name for each in elements.ELEMENTS.values() if each.origin is elements.Origin.SAMI]
    assert said.strip().split(",") == ours
