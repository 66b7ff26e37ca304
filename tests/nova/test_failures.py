"""What goes wrong while real Nova moves a guest; its connection lives on, and nothing stays where the guest is not."""

from __future__ import annotations

import signal

import pytest

from lab.deadline import wait_until
from lab.openstack import addresses
from lab.openstack.api import Refused
from lab.openstack.lab import OpenStackLab
from lab.openstack.migration import Migration
from lab.openstack.sami import Sami
from tests.nova.case import HOLD_SECONDS, Case, downloading

pytestmark = [pytest.mark.usefixtures("openstack_here"), pytest.mark.timeout(900)]

SLOW_CABLE_MEGABITS = 32
ESP = "50"


def fails(case: Case, migration: Migration, *statuses: str) -> None:
    """Asserts that the guest has stayed, as Nova, libvirt and we say, and lives on."""
    assert migration.wait().status in statuses
    case.stays()
    reports = case.report(case.source), case.report(case.destination)
    assert [report["outcome"] for report in reports] == ["stayed", "stayed"], reports


@pytest.mark.parametrize("operation", ["prepare", "start", "started"])
def test_veto_of_another_hook_leaves_the_guest_and_its_connection_where_they_are(case: Case, operation: str) -> None:
    with case.destination.veto(operation):
        migration = case.start()
        fails(case, migration, "failed")


def test_abort_while_memory_is_copied(case: Case) -> None:
    with case.source.slow_cable(SLOW_CABLE_MEGABITS):
        migration = case.start()
        migration.wait_for("MIGRATION_ITERATION 1")
        migration.abort()
        # "failed" where the other QEMU ends first: Nova does not take libvirt's "Channel error" for an abort.
        fails(case, migration, "cancelled", "failed")


def test_guest_that_is_forced_to_complete_moves_with_its_connection(case: Case) -> None:
    with case.source.slow_cable(SLOW_CABLE_MEGABITS), case.destination.held(HOLD_SECONDS):
        migration = case.start()
        migration.wait_for("MIGRATION_ITERATION 1")
        migration.force_complete()
        assert migration.wait().status == "completed"
    case.has_moved(migration)


def test_our_own_veto_is_in_novas_log_and_in_the_report(case: Case) -> None:
    zone = str(case.source.zone(case.guest.tap))
    ends = ["-s", case.guest.address, "-d", addresses.outside(1), "-p", ESP]
    case.source.run(["conntrack", "-I", "-w", zone, *ends, "-t", "600", "-u", "SEEN_REPLY"])
    log = case.source.nova_compute.log
    before = log.stat().st_size
    try:
        with case.sami.hosts[case.destination.name].policy(f"guests = {case.guest.uuid}:veto"):
            migration = case.start()
            assert migration.wait().status == "failed"
    finally:
        case.source.run(["conntrack", "-D", "-w", zone, *ends])
    with log.open("rb") as said:
        said.seek(before)
        words = said.read().decode(errors="replace")
    rows = case.sami.hosts[case.destination.name].report(migration.request_id)
    losses = [row["What"] for row in rows if row["Part"] == "verdict" and row["What"].startswith("losses: ")]
    case.stays()
    assert len(losses) == 1, rows
    assert "sami-agent refuses the migration" in words, words[-3000:]
    assert losses[0].removeprefix("losses: ") in words, (losses, words[-3000:])


# --- Something ends in the middle


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGKILL])
def test_novas_service_at_the_destination_is_restarted(case: Case, with_signal: signal.Signals) -> None:
    with case.destination.held(HOLD_SECONDS):
        migration = case.start()
        migration.wait_for("started begin", case.destination.name)
        case.destination.nova_compute.restart(with_signal)
        arrived = case.arrival(migration)
    assert case.goes_on(arrived), case.sami.words()
    case.has_moved(migration)
    assert migration.wait().host == case.destination.name


def test_novas_service_at_the_source_is_killed_and_libvirt_moves_the_guest_all_the_same(
    lab: OpenStackLab, sami: Sami
) -> None:
    """Nova does not find out where it is: the guest is of no more use."""
    case = Case(lab, sami, *downloading(lab, "orphan", "a"))
    with case.destination.held(HOLD_SECONDS):
        migration = case.start()
        migration.wait_for("started begin", case.destination.name)
        case.source.nova_compute.stop(signal.SIGKILL)
        case.arrival(migration)
    case.has_moved(migration)
    # Not before: where a guest goes while Nova's service starts and lists the guests, it ends (seen with 26).
    case.source.nova_compute.start()
    lab.wait_until_nova_reports(case.source.name)
    case.destination.virsh("destroy", case.guest.domain)
    case.destination.virsh("undefine", case.guest.domain)
    lab.remove_guest(case.guest)


@pytest.mark.parametrize("where", ["source", "destination"])
def test_agent_is_killed_and_started_again(case: Case, where: str) -> None:
    agent = case.sami.agents[getattr(case, where).name]
    with case.destination.held(HOLD_SECONDS):
        migration = case.start()
        migration.wait_for("started begin", case.destination.name)
        agent.stop(signal.SIGKILL)
        agent.start()
        assert migration.wait().status == "completed"
    case.has_moved(migration)


def test_broker_is_away_at_the_cut_over(case: Case) -> None:
    """Nova waits for it as well, but libvirt does not."""
    with case.destination.held(HOLD_SECONDS):
        migration = case.start()
        zone_at = case.destination.wait_for_rules(case.guest.tap)
        wait_until(lambda: case.entries(case.destination) >= 1, "the flow to be at the destination", 30)
        for host in (case.source, case.destination):
            case.lab.relays[host.name].cut()
        try:
            arrived = case.arrival(migration)
            assert zone_at < arrived
            assert case.goes_on(arrived), case.sami.words()
        finally:
            for host in (case.source, case.destination):
                case.lab.relays[host.name].mend()
    assert migration.wait().status == "completed"
    assert case.report(case.source)["outcome"] in ("moved", "purged without arrival")
    case.report(case.destination)
    assert case.source.entries(case.guest.address) == []


def test_nova_refuses_to_abort_what_is_over(case: Case) -> None:
    migration = case.move()
    with pytest.raises(Refused):
        migration.abort()
    case.has_moved(migration)
