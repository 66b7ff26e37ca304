"""What the runs of Nova's own tests are judged by; the runs are made up here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lab.nova_tests import findings
from lab.nova_tests.agents import Announcement
from lab.nova_tests.run import Outcome, Ran

TEST = "nova.tests.functional.test_servers.ServerMovingTests.test_live_migrate"
GUEST = "6ac30000-0000-4000-8000-000000000001"
REQUEST = "req-1"
ANNOUNCED = Announcement(4.5, GUEST, "src", "dest", REQUEST)


def called(at: float, name: str, on: str | None) -> dict[str, Any]:
    said = {"on": on, "guest": GUEST, "guests_host": "src", "request_id": REQUEST}
    return {"at": at, "test": TEST, "called": name, **said}


def notified(at: float, event: str, publisher: str) -> dict[str, Any]:
    said = {"publisher": publisher, "guest": GUEST, "guests_host": "src", "drivers": ["test", "sami"]}
    return {"at": at, "test": TEST, "notified": event, **said}


def as_it_should_be() -> Ran:
    events = [
        called(1, "check_can_live_migrate_destination", "dest"),
        called(2, "check_can_live_migrate_source", "src"),
        called(3, "bind_ports_to_host", None),
        notified(4, "instance.live_migration_pre.start", "nova-compute:dest"),
        called(5, "pre_live_migration", "dest"),
        called(6, "plug_vifs", "dest"),
        notified(7, "instance.live_migration_pre.end", "nova-compute:dest"),
        called(8, "live_migration", "src"),
        notified(9, "compute.instance.live_migration._post.start", "compute.src"),
        called(10, "migrate_instance_start", None),
        called(11, "post_live_migration", "src"),
    ]
    return Ran("with", {TEST: Outcome("passed", 1.0, "")}, events, [ANNOUNCED])


def test_migration_as_nova_does_it_has_no_fault() -> None:
    assert findings.order_faults(as_it_should_be(), "34") == []


def test_each_release_has_an_order_of_its_own() -> None:
    (fault,) = findings.order_faults(as_it_should_be(), "26")
    assert "the order is" in fault


@pytest.mark.parametrize(
    ("announcement", "words"),
    [
        (replace(ANNOUNCED, at=5.5), "the order is"),
        (replace(ANNOUNCED, source="elsewhere"), "guests_host: 'elsewhere' was announced, it is 'src'"),
        (replace(ANNOUNCED, destination="elsewhere"), "on: 'elsewhere' was announced, it is 'dest'"),
        (replace(ANNOUNCED, request_id=""), "request_id: '' was announced, it is 'req-1'"),
        (None, "1 notifications were to be announced, 0 were"),
    ],
)
def test_announcement_that_is_late_or_wrong_or_missing_is_found(announcement: Announcement | None, words: str) -> None:
    ran = as_it_should_be()
    ran.announcements[:] = [] if announcement is None else [announcement]
    assert any(words in fault for fault in findings.order_faults(ran, "34"))


def test_what_a_user_asks_meanwhile_has_no_order_among_the_migrations_calls() -> None:
    without, ran = as_it_should_be(), as_it_should_be()
    forced = notified(8.5, "instance.live_migration_force_complete.end", "nova-compute:src")
    without.events.insert(8, forced)
    ran.events.insert(9, forced)
    assert findings.differences(without, ran) == []


def test_migration_that_outlives_its_test_is_seen_more_or_less_of() -> None:
    without, ran = as_it_should_be(), as_it_should_be()
    del ran.events[-1]
    assert findings.differences(without, ran) == []


def test_run_in_which_nothing_was_announced_proves_nothing() -> None:
    assert findings.order_faults(Ran("with"), "34") == ["no live migration was notified with the driver"]


def test_what_ends_otherwise_or_is_not_run_or_calls_something_else_differs() -> None:
    without, ran = replace(as_it_should_be(), name="without"), as_it_should_be()
    assert findings.differences(without, ran) == []
    ran.outcomes[TEST] = Outcome("failed", 1.0, "Traceback\nMismatchError: 1 != 2\n")
    ran.outcomes["another"] = Outcome("passed", 1.0, "")
    ran.events[-2:] = ran.events[:-3:-1]
    assert findings.differences(without, ran) == [
        "another: is not in both runs",
        f"{TEST}: without: passed; with: failed: MismatchError: 1 != 2",
        f"{TEST}: Nova's calls are not those without it",
    ]
