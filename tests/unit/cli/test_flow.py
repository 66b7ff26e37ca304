"""sami flow: lists, files, and what became of each flow."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import netaddr
import numpy as np
import pytest

from sami_plugin.cli import flow_transfer, scope_options, terminal
from sami_plugin.codec import ipfix_file
from sami_plugin.drivers.memory import Faults, MemoryDevice, MemoryDriver
from sami_plugin.errors import ConfigurationError, DeviceFailed, NotAvailable
from sami_plugin.model.flows import ACCOUNTING, TEMPLATES, Batch, Omitted, ZoneRole
from sami_plugin.model.results import Reason
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import (
    NEIGHBOUR_ADDRESSES,
    OUTSIDE_ADDRESSES,
    PORT_ADDRESSES,
    TIMEOUT_SECONDS,
    flows,
)
from tests.unit.cli.command_line import CommandLine

TCP, TCP6, NAT = TEMPLATES["tcp-ipv4"], TEMPLATES["tcp-ipv6"], TEMPLATES["tcp-nat-ipv4"]
GUEST, GUEST6 = (next(str(one) for one in PORT_ADDRESSES if one.version == version) for version in (4, 6))


def put(sami: CommandLine, zone: int, *batches: Batch) -> None:
    scope = Scope("", "", {ZoneRole.PORT: zone}, (*PORT_ADDRESSES, *OUTSIDE_ADDRESSES, *NEIGHBOUR_ADDRESSES))
    for batch in batches:
        sami.driver.insert(scope, batch)


def listed(sami: CommandLine, *arguments: object) -> list[dict[str, Any]]:
    assert sami("flow", "list", "-f", "json", *arguments) == 0
    found: list[dict[str, Any]] = json.loads(sami.out)
    return found


def results(sami: CommandLine) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in json.loads(sami.out):
        found[row["Result"]] = found.get(row["Result"], 0) + row["Flows"]
    return found


# list


def test_what_is_no_flow_is_told_by_the_words_of_its_kind(sami: CommandLine) -> None:
    kind = TEMPLATES["nft-set-element-ipv4"]
    sami.templates = frozenset({kind.name})
    put(sami, 7, flows(kind, 1))
    (row,) = listed(sami, "--zone", 7)
    assert (row["Protocol"], row["Detail"]) == ("nft-set-element-ipv4", f"{GUEST} in")
    assert (row["Timeout"], row["Source"], row["Mark"]) == (TIMEOUT_SECONDS, "", None)


def test_list_shows_flows_in_words(sami: CommandLine) -> None:
    put(sami, 7, flows(TCP, 1), flows(TCP6, 1), flows(TEMPLATES["icmp-ipv4"], 1), flows(NAT, 1, first=500))
    rows = listed(sami, "--zone", 7)
    by_kind = {(row["Protocol"], row["Source"][0] == "[", bool(row["Detail"])): row for row in rows}
    tcp = by_kind["tcp", False, False]
    assert tcp["Source"] == f"{GUEST}:20000"
    assert tcp["State"] == "ESTABLISHED"
    assert tcp["Status"] == "SEEN_REPLY,ASSURED,CONFIRMED"
    assert (tcp["Timeout"], tcp["Mark"], tcp["Zone role"]) == (600, 1, "PORT")
    assert by_kind["tcp", True, False]["Source"] == f"[{GUEST6}]:20000"
    assert by_kind["icmp", False, True]["Detail"] == "type 8 code 0 id 1"
    assert by_kind["tcp", False, True]["Detail"].startswith("translated to ")


def test_list_shows_what_few_flows_have(sami: CommandLine) -> None:
    batch = flows(TEMPLATES["tcp-nat-extended-ipv4"], 1)
    batch.rows["conntrackLabels"] = (1 << 5, 1)
    batch.rows["masterProtocolIdentifier"], batch.rows["masterSourceIPv4Address"] = 6, batch.rows["sourceIPv4Address"]
    batch.rows["masterSourceTransportPort"], batch.rows["masterDestinationTransportPort"] = 1000, 21
    other = flows(TEMPLATES["udp-extended-ipv6"], 1)
    batch.rows["octetTotalCount"], batch.rows["packetTotalCount"] = 3 * 60, 3
    batch.rows["reverseOctetTotalCount"], batch.rows["reversePacketTotalCount"] = 52, 0
    batch.rows["flowStartMilliseconds"] = 1_700_000_000_123
    for name in ACCOUNTING:
        other.rows[name] = 0
    other.rows["flowStartMilliseconds"] = (1 << 64) - 1  # from a file may come anything
    put(sami, 7, batch, other)
    tcp, udp = (row["Detail"] for row in listed(sami, "--zone", 7))
    behind, *others = tcp.split(", ")
    assert behind.startswith("translated to ")
    assert others == [
        "helper ftp",
        f"expected by tcp {GUEST}:1000 > 0.0.0.0:21",
        "labels 5 64",
        "sequence numbers adjusted",
        "sent 3 packets of 180 octets",
        "answered 0 packets of 52 octets",
        "began 2023-11-14T22:13:20.123Z",
    ]
    assert udp == "helper tftp, labels 0 127"


@pytest.mark.parametrize(
    ("kind", "ends", "state", "detail"),
    [
        ("sctp", ("{}:20000", "{}:443"), "ESTABLISHED", ""),
        ("udplite", ("{}:20000", "{}:443"), "", ""),
        ("gre", ("{}", "{}"), "", "key 20000 reverse key 443"),
    ],
)
def test_list_shows_other_protocols_by_what_tells_their_flows_apart(
    sami: CommandLine, kind: str, ends: tuple[str, str], state: str, detail: str
) -> None:
    put(sami, 7, flows(TEMPLATES[f"{kind}-ipv4"], 1), flows(TEMPLATES[f"{kind}-ipv6"], 1))
    addresses = [GUEST, GUEST6], list(map(str, OUTSIDE_ADDRESSES))
    if kind != "gre":
        addresses = [[one, f"[{six}]"] for one, six in addresses]  # type: ignore[assignment]
    for family, row in enumerate(listed(sami, "--zone", 7)):
        assert row["Protocol"] == kind
        assert (row["Source"], row["Destination"]) == tuple(
            form.format(of_end[family]) for form, of_end in zip(ends, addresses, strict=True)
        )
        assert (row["State"], row["Detail"]) == (state, detail)


def test_list_shows_no_more_than_the_limit_and_says_how_many_more(sami: CommandLine) -> None:
    put(sami, 7, flows(TCP, 30), flows(TCP6, 30))
    assert len(listed(sami, "--zone", 7, "--limit", 40)) == 40
    assert sami.err == "sami: 20 more flows are not shown; --limit or --all shows them\n"
    assert len(listed(sami, "--zone", 7, "--all")) == 60
    assert sami.err == ""
    assert listed(sami, "--zone", 7, "--limit", 0) == []


def test_list_of_an_address_shows_no_other_flow(sami: CommandLine) -> None:
    put(sami, 7, flows(TCP, 3), flows(TCP, 2, source=NEIGHBOUR_ADDRESSES, first=100))
    assert len(listed(sami, "--zone", 7)) == 5
    assert len(listed(sami, "--zone", 7, "--address", GUEST)) == 3
    assert len(listed(sami, "--zone", 7, "--address", GUEST, "--shared")) == 3


def test_list_of_another_zone_is_empty(sami: CommandLine) -> None:
    put(sami, 7, flows(TCP, 3))
    assert listed(sami, "--zone", 8) == []


def test_address_with_an_interface_is_refused(sami: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sami("flow", "list", "--zone", 7, "--address", "fe80::1%eth0")
    said = "argument --address: 'fe80::1%eth0' names an interface, which no flow's address does; leave %eth0 out"
    assert said in " ".join(capsys.readouterr().err.split())


def test_shared_zone_without_addresses_is_refused(sami: CommandLine) -> None:
    assert sami("flow", "list", "--zone", 7, "--shared") == 1
    assert "--address" in sami.err


def test_csv_comes_with_the_same_columns(sami: CommandLine) -> None:
    put(sami, 7, flows(TCP, 2))
    assert sami("flow", "list", "--zone", 7, "-f", "csv", "-c", "Protocol", "-c", "Mark") == 0
    assert list(csv.reader(io.StringIO(sami.out))) == [["Protocol", "Mark"], ["tcp", "1"], ["tcp", "2"]]


@pytest.mark.parametrize(
    ("given", "path"), [("fw", "/run/netns/fw"), ("/proc/1/ns/net", "/proc/1/ns/net"), ("./fw", "./fw"), (None, None)]
)
def test_namespace_is_a_name_or_a_path(given: str | None, path: str | None) -> None:
    arguments = argparse.Namespace(namespace=given, zone=7, address=[], shared=False)
    assert scope_options.scope_of(arguments).namespace == path


# export


class Partial(MemoryDriver):
    """Cannot express some flows, and tells the others twice."""

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        yield from super().export(scope)
        yield from super().export(scope)
        yield Omitted("protocol gre is not carried", 12, ("gre a > b", "gre c > d"))


class Breaks(MemoryDriver):
    """Fails in the middle of an export."""

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        yield from super().export(scope)
        raise DeviceFailed("the device broke")


def test_export_says_by_name_what_is_left_out_and_tells_each_flow_once(
    sami: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(sami, 7, flows(TCP, 3))
    monkeypatch.setattr(sami, "load_driver", lambda name: Partial(sami.device))
    file = tmp_path / "flows.ipfix"
    assert sami("flow", "export", file, "--zone", 7) == 0
    assert sami.out == f"3 flows written to {file}\n"
    assert sami.err == "sami: 12 flows are left out, protocol gre is not carried: gre a > b, gre c > d, 10 more\n"
    assert len(ipfix_file.read(file)) == 3


def test_export_never_overwrites_a_file_unless_told_to(sami: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "flows.ipfix"
    file.write_text("precious")
    assert sami("flow", "export", file, "--zone", 7) == 1
    assert "--force" in sami.err
    assert file.read_text() == "precious"
    # The firewall is not even asked.
    assert sami("flow", "export", file, "--zone", 8, "--shared") == 1
    assert "--force" in sami.err
    assert sami("flow", "export", file, "--zone", 7, "--force") == 0
    assert len(ipfix_file.read(file)) == 0


def test_export_that_fails_leaves_no_file_and_keeps_the_old_one(
    sami: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sami, "load_driver", lambda name: Breaks(sami.device))
    file = tmp_path / "flows.ipfix"
    assert sami("flow", "export", file, "--zone", 7) == 1
    assert sami.err == "sami: the device broke\n"
    assert list(tmp_path.iterdir()) == []
    file.write_text("precious")
    assert sami("flow", "export", file, "--zone", 7, "--force") == 1
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("flows.ipfix", "precious")]


def test_export_does_not_replace_a_file_that_appeared_meanwhile(
    sami: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "flows.ipfix"

    class Slow(MemoryDriver):
        def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
            file.write_text("precious")
            return iter(())

    monkeypatch.setattr(sami, "load_driver", lambda name: Slow(sami.device))
    assert sami("flow", "export", file, "--zone", 7) == 1
    assert "--force" in sami.err
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("flows.ipfix", "precious")]


@pytest.mark.parametrize("place", ["none/flows.ipfix", "."])
def test_export_to_where_no_file_can_be_is_one_line(sami: CommandLine, tmp_path: Path, place: str) -> None:
    assert sami("flow", "export", tmp_path / place, "--zone", 7) == 1
    assert sami.err.count("\n") == 1
    assert "fault of sami" not in sami.err


def test_exported_file_is_its_owners_alone(sami: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "flows.ipfix"
    sami("flow", "export", file, "--zone", 7)
    assert file.stat().st_mode & 0o777 == 0o600


def test_enterprise_number_that_cannot_be_one_is_refused(sami: CommandLine, tmp_path: Path) -> None:
    for command in ("export", "import"):
        assert sami("flow", command, tmp_path / "f", "--zone", 7, "--enterprise-number", 0) == 1
        assert sami.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# import


@pytest.fixture
def file(sami: CommandLine, tmp_path: Path) -> Path:
    """An exported file of 5 flows of the guest over IPv4, 4 over IPv6, and 3 of a neighbour; the zone was 7."""
    put(sami, 7, flows(TCP, 5), flows(TCP6, 4), flows(TCP, 3, source=NEIGHBOUR_ADDRESSES, first=100))
    path = tmp_path / "flows.ipfix"
    assert sami("flow", "export", path, "--zone", 7) == 0
    sami.device = MemoryDevice()
    return path


def test_import_puts_the_same_flows_into_another_zone(sami: CommandLine, file: Path) -> None:
    assert sami("flow", "import", file, "--zone", 9, "-f", "json") == 0
    assert results(sami) == {"imported": 12}
    assert len(listed(sami, "--zone", 9)) == 12
    assert listed(sami, "--zone", 7) == []


def test_import_refuses_by_name_flows_that_are_not_the_addresses(sami: CommandLine, file: Path) -> None:
    assert sami("flow", "import", file, "--zone", 9, "--address", GUEST, "--address", GUEST6, "-f", "json") == 1
    assert results(sami) == {"imported": 9, "refused": 3}
    refused = json.loads(sami.out)[-1]
    neighbour = next(str(one) for one in NEIGHBOUR_ADDRESSES if one.version == 4)
    assert refused["Reason"] == "neither end is an address of the port"
    assert all(neighbour in name for name in refused["Names"])
    assert len(listed(sami, "--zone", 9)) == 9


def test_import_tells_what_the_device_did_not_keep(sami: CommandLine, file: Path) -> None:
    sami.device.faults = Faults(drop_fields=frozenset({"flowMark"}))
    assert sami("flow", "import", file, "--zone", 9, "-f", "json") == 0
    assert [(row["Result"], row["Reason"]) for row in json.loads(sami.out)] == [("degraded", "not kept: flowMark")]


def test_import_tells_what_the_device_refused_and_exits_with_1(sami: CommandLine, file: Path) -> None:
    sami.device.faults = Faults(refuse=lambda batch: np.arange(len(batch)) == 0, refuse_reason=Reason.BUSY)
    assert sami("flow", "import", file, "--zone", 9, "--address", GUEST6, "-f", "json") == 1
    assert results(sami) == {"imported": 3, "refused": 9}


def test_import_names_the_first_flows_and_counts_the_rest(sami: CommandLine, file: Path) -> None:
    assert sami("flow", "import", file, "--zone", 9, "-f", "json") == 0
    (row,) = json.loads(sami.out)
    assert len(row["Names"]) == 4
    assert row["Names"][-1] == "... and 9 more"


DAMAGES = [lambda octets: octets[:-3], lambda octets: b"\x00\x01" + octets, lambda octets: b""]


@pytest.mark.parametrize("damage", DAMAGES)
def test_malformed_file_is_refused_as_a_whole(sami: CommandLine, file: Path, damage: Any) -> None:
    file.write_bytes(damage(file.read_bytes()))
    assert sami("flow", "import", file, "--zone", 9) == 1
    assert sami.err.count("\n") == 1
    assert sami.out == ""
    assert sami.device.count == 0


def test_file_of_another_enterprise_is_refused(sami: CommandLine, file: Path) -> None:
    assert sami("flow", "import", file, "--zone", 9, "--enterprise-number", 4711) == 1
    assert sami.device.count == 0


def test_dry_run_changes_nothing_and_tells_the_same(sami: CommandLine, file: Path) -> None:
    put(sami, 9, flows(TCP, 1))
    arguments = ("flow", "import", file, "--zone", 9, "--address", GUEST, "--address", GUEST6, "-f", "json")
    assert sami(*arguments, "--dry-run") == 1
    assert results(sami) == {"would import": 8, "would replace": 1, "would refuse": 3}
    assert sami.device.count == 1


def test_missing_file_is_one_line(sami: CommandLine, tmp_path: Path) -> None:
    assert sami("flow", "import", tmp_path / "none", "--zone", 9) == 1
    assert sami.err.count("\n") == 1


def test_neighbour_without_shared_is_refused(sami: CommandLine, file: Path) -> None:
    assert sami("flow", "import", file, "--zone", 9, "--neighbour", "192.0.2.99") == 1
    assert "--shared" in sami.err


def test_neighbours_flows_are_left_alone(sami: CommandLine, tmp_path: Path) -> None:
    theirs = flows(TCP, 2, destination=NEIGHBOUR_ADDRESSES)
    path = tmp_path / "f"
    ipfix_file.write(path, [theirs, flows(TCP, 1, first=50)], export_time=1)
    put(sami, 9, theirs.take(np.array([0])))
    neighbour = next(str(one) for one in NEIGHBOUR_ADDRESSES if one.version == 4)
    arguments = ("--address", GUEST, "--shared", "--neighbour", neighbour, "-f", "json")
    assert sami("flow", "import", path, "--zone", 9, *arguments) == 1
    assert results(sami) == {"imported": 1, "present": 1, "refused": 1}


def test_old_file_is_remarked_on(sami: CommandLine, tmp_path: Path) -> None:
    ipfix_file.write(tmp_path / "f", [flows(TCP, 1)], export_time=1_700_000_000)
    assert sami("flow", "import", tmp_path / "f", "--zone", 9) == 0
    assert "ago" in sami.err


def test_flow_that_has_run_out_or_has_no_zone_or_no_state_is_refused() -> None:
    batch = flows(TCP, 3)
    batch.rows["remainingTimeoutSeconds"][0] = 0
    batch.rows["zoneRole"][1] = ZoneRole.SNAT
    driver, scope = MemoryDriver(), Scope("", "", {ZoneRole.PORT: 7}, ())
    for act in (lambda *all_: flow_transfer.import_(*all_, done=lambda count: None), flow_transfer.rehearse):
        lines = act(driver, scope, [batch, flows(TCP, 2, first=100).identities]).lines()
        found = sorted((line.count, line.reason) for line in lines if "refuse" in line.result)
        assert [count for count, _ in found] == [1, 1, 2]
        assert found[2][1] == flow_transfer.ONLY_A_NAME


def test_import_without_addresses_takes_flows_of_very_many() -> None:
    batch = flows(TCP, 700)
    batch.rows["sourceIPv4Address"] = 0x0A000000 + np.arange(700)
    batch.rows["destinationIPv4Address"] = 0x0B000000 + np.arange(700)
    scope = Scope("", "", {ZoneRole.PORT: 7}, ())
    outcomes = flow_transfer.import_(MemoryDriver(), scope, [batch], lambda count: None)
    assert [(line.result, line.count) for line in outcomes.lines()] == [("imported", 700)]


def test_device_that_fails_in_the_middle_is_told_with_how_far_it_came() -> None:
    driver = MemoryDriver(MemoryDevice(faults=Faults(fail_after=5)))
    scope = Scope("", "", {ZoneRole.PORT: 7}, PORT_ADDRESSES)
    with pytest.raises(NotAvailable, match="5 flows were dealt with before"):
        flow_transfer.import_(driver, scope, [flows(TCP, 5), flows(TCP6, 5)], lambda count: None)


def test_export_of_addresses_uses_both_ends() -> None:
    driver = MemoryDriver()
    here = netaddr.IPAddress(GUEST)
    scope = Scope("", "", {ZoneRole.PORT: 7}, (here,))
    driver.insert(scope, flows(TCP, 2, source=OUTSIDE_ADDRESSES, destination=PORT_ADDRESSES))
    assert len(flow_transfer.export(driver, scope, lambda count: None)) == 2


# while it lasts


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_PAUSE_SECONDS", 0.0)
    for stream in (io.StringIO(), Terminal()):
        with terminal.Progress(stream, "flows") as done:
            done(10)
        assert ("flows: 10 ..." in stream.getvalue()) is stream.isatty()


def test_shared_without_addresses_raises() -> None:
    with pytest.raises(ConfigurationError):
        scope_options.scope_of(argparse.Namespace(namespace=None, zone=7, address=[], shared=True))
