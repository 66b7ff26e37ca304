"""What is wrong in a run: what differs from the run without the driver, and what comes in another order than it has to.

All of it is decided from what was recorded; each finding is a line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from lab.nova_tests.run import Event, Ran

MOST_HELD_SECONDS = 3.0
"""What the driver promises, 2 s, and what a busy machine may take on top."""
FORMATS = ("instance.live_migration_pre.start", "compute.instance.live_migration.pre.start")
"""The notification that is announced, in either format."""

_BEGINS = (
    "check_can_live_migrate_destination",
    "check_can_live_migrate_source",
    "bind_ports_to_host",
    "live_migration_pre.start",
    "announced",
    "pre_live_migration",
    "plug_vifs",
    "live_migration_pre.end",
    "live_migration",
)
_ENDS = (
    "live_migration_post_dest.start",
    "post_live_migration_at_destination",
    "live_migration_post_dest.end",
    "live_migration_post.end",
)
ORDERS = {
    "26": (
        *_BEGINS,
        "post_live_migration",
        "live_migration_post.start",
        "migrate_instance_start",
        "post_live_migration_at_source",
        *_ENDS,
    ),
    "34": (
        *_BEGINS,
        "live_migration_post.start",
        "migrate_instance_start",
        "post_live_migration",
        "post_live_migration_at_source",
        *_ENDS,
    ),
}
"""By release, in which order a guest's migration has these for the first time, as far as it has them."""


def outcome_differences(one: Ran, other: Ran) -> list[str]:
    """Tests that are not in both, or end otherwise."""
    found = [f"{test}: is not in both runs" for test in sorted(one.outcomes.keys() ^ other.outcomes.keys())]
    for test in sorted(one.outcomes.keys() & other.outcomes.keys()):
        was, became = one.outcomes[test], other.outcomes[test]
        if was.ended != became.ended:
            found.append(f"{test}: {one.name}: {was.ended}; {other.name}: {became.ended}: {last_line(became.words)}")
    return found


def differences(without: Ran, other: Ran) -> list[str]:
    """The same, and tests in which Nova called something else, or in another order.

    A test may end before its migration has: then one run has seen more of it than the other.
    """
    before, after = calls(without), calls(other)
    changed = [
        test
        for test in sorted(before.keys() & after.keys())
        if any(one[: len(two)] != two[: len(one)] for one, two in zip(before[test], after[test], strict=False))
    ]
    return outcome_differences(without, other) + [f"{test}: Nova's calls are not those without it" for test in changed]


def last_line(words: str) -> str:
    """What a traceback ends with."""
    return (words.strip().splitlines() or [""])[-1][:300]


def calls(ran: Ran) -> dict[str, list[list[str]]]:
    """By test, and of each of its guests in the order they appear: what was called and notified, and on which host.

    A guest is the test's that it was first seen in: Nova's threads may outlive their test. Hosts are numbered, for in
    some tests Nova's scheduler is free to choose. What a user asks of a migration under way, to end it or to complete
    it, is another thread's and a list of its own.
    """
    tests: dict[str, list[list[str]]] = defaultdict(list)
    guests: dict[tuple[str, bool], list[str]] = {}
    hosts: dict[str, dict[str, int]] = defaultdict(dict)
    for event in ran.events:
        guest = event.get("guest")
        what = event.get("called") or event.get("notified") or ""
        thread = (guest, any(word in what for word in ("abort", "force")))
        if guest is None or (thread not in guests and event["test"] is None):
            continue
        if thread not in guests:
            guests[thread] = []
            tests[event["test"]].append(guests[thread])
        on = event.get("on") or host_of(event.get("publisher") or "")
        number = hosts[guest].setdefault(on, len(hosts[guest])) if on else ""
        guests[thread].append(f"{what} on host {number}")
    return dict(tests)


def host_of(publisher: str) -> str:
    """`nova-compute:dest` and `compute.dest` are on dest."""
    return publisher.split(":" if ":" in publisher else ".", 1)[-1]


def announcing(ran: Ran) -> list[Event]:
    """The notifications that our driver was told and has to announce."""
    return [event for event in ran.events if event.get("notified") in FORMATS and "sami" in event["drivers"]]


def held(ran: Ran) -> list[float]:
    """For how long Nova waited for our driver, seconds; what is nothing is not in it."""
    return [event["held_seconds"] for event in ran.events if "held_seconds" in event]


def order_faults(ran: Ran, release: str) -> list[str]:
    """Of a run with an agent: what was announced wrongly, not, or too late; and migrations in another order."""
    found = []
    wanted, announcements = announcing(ran), ran.announcements
    if not wanted:
        found.append("no live migration was notified with the driver")
    if len(announcements) != len(wanted):
        found.append(f"{len(wanted)} notifications were to be announced, {len(announcements)} were")
    for notified, announced in zip(wanted, announcements, strict=False):
        destination = host_of(notified["publisher"])
        said = (announced.guest, announced.source, announced.destination)
        if said != (notified["guest"], notified["guests_host"], destination):
            found.append(f"{notified['test']}: {notified['notified']} was announced as {said}")
        if announced.at < notified["at"]:
            found.append(f"{notified['test']}: {notified['notified']} was announced before it was notified")
    for test, story in migrations(ran):
        found += [f"{test}: {fault}" for fault in _faults_of_one(story, release)]
    return found


def migrations(ran: Ran) -> Iterator[tuple[str, list[Event]]]:
    """The functional tests' migrations of a guest: all that has to do with it, from its first check on.

    An announcement is an event too: `called` is "announced".
    """
    told = [
        {
            "at": one.at,
            "called": "announced",
            "guest": one.guest,
            "guests_host": one.source,
            "on": one.destination,
            "request_id": one.request_id,
        }
        for one in ran.announcements
    ]
    stories: dict[str, list[Event]] = {}
    tests: dict[str, str] = {}
    for event in sorted([*ran.events, *told], key=lambda event: event["at"]):
        guest = event.get("guest")
        if event.get("called") == "check_can_live_migrate_destination" and guest is not None:
            if ".functional." not in (event["test"] or ""):
                continue  # a unit test is a piece of a migration
            if guest in stories:
                yield tests[guest], stories[guest]
            stories[guest], tests[guest] = [event], event["test"]
        elif guest in stories:
            stories[guest].append(event)
    for guest, story in stories.items():
        yield tests[guest], story


def _faults_of_one(story: list[Event], release: str) -> Iterator[str]:
    order = ORDERS[release]
    first: dict[str, Event] = {}
    for event in story:
        first.setdefault(_word(event), event)
    seen = [word for word in first if word in order]
    if seen != [word for word in order if word in first]:
        yield f"the order is {', '.join(seen)}"
    prepared, told = first.get("pre_live_migration"), first.get("announced")
    if prepared is None:
        return
    if told is None:
        yield "the virt driver prepares a guest that was not announced"
        return
    for what in ("on", "guests_host", "request_id"):
        if told[what] != prepared[what]:
            yield f"{what}: {told[what]!r} was announced, it is {prepared[what]!r}"


def _word(event: Event) -> str:
    """One word for a notification of both formats."""
    word: str = event.get("called") or event.get("notified") or ""
    if word.startswith("compute."):
        word = LEGACY.get(word, word)
    return word.removeprefix("instance.")


LEGACY = {
    "compute.instance.live_migration.pre.start": "live_migration_pre.start",
    "compute.instance.live_migration.pre.end": "live_migration_pre.end",
    "compute.instance.live_migration._post.start": "live_migration_post.start",
    "compute.instance.live_migration._post.end": "live_migration_post.end",
    "compute.instance.live_migration.post.dest.start": "live_migration_post_dest.start",
    "compute.instance.live_migration.post.dest.end": "live_migration_post_dest.end",
}
