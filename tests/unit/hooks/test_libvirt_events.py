"""libvirt's words in ours, and what is made of its silence. Real libvirt is asked in tests/libvirt."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lab.deadline import wait_until
from sami_plugin.errors import JournalError, NotAvailable, OperatorError
from sami_plugin.hooks import domain_xml, libvirt_events
from sami_plugin.hooks.descriptions import Descriptions
from sami_plugin.hooks.libvirt_events import LibvirtHost, Mark
from sami_plugin.journal.journal import Journal
from sami_plugin.model.migration import MigrationEvent, Origin, Phase

GUEST, OTHER = "6ac3d3f1-4c0e-4d2a-9a53-cd3a9fd4a0f4", "0d6f6d0e-5e6f-4a34-9d0b-6a6f0b1f3c55"
NAMES = [
    "VIR_DOMAIN_EVENT_STARTED",
    "VIR_DOMAIN_EVENT_SUSPENDED",
    "VIR_DOMAIN_EVENT_RESUMED",
    "VIR_DOMAIN_EVENT_STOPPED",
    "VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN",
    "VIR_DOMAIN_EVENT_STOPPED_DESTROYED",
    "VIR_DOMAIN_EVENT_STOPPED_CRASHED",
    "VIR_DOMAIN_EVENT_STARTED_MIGRATED",
    "VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED",
    "VIR_DOMAIN_EVENT_SUSPENDED_PAUSED",
    "VIR_DOMAIN_EVENT_RESUMED_MIGRATED",
    "VIR_DOMAIN_EVENT_RESUMED_UNPAUSED",
    "VIR_DOMAIN_EVENT_RESUMED_POSTCOPY",
    "VIR_DOMAIN_EVENT_RESUMED_FROM_SNAPSHOT",
    "VIR_DOMAIN_EVENT_STOPPED_MIGRATED",
    "VIR_DOMAIN_EVENT_STOPPED_FAILED",
    "VIR_DOMAIN_EVENT_ID_LIFECYCLE",
    "VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION",
    "VIR_DOMAIN_RUNNING",
    "VIR_DOMAIN_PAUSED",
    "VIR_DOMAIN_SHUTOFF",
    "VIR_DOMAIN_PMSUSPENDED",
    "VIR_DOMAIN_PAUSED_USER",
    "VIR_DOMAIN_PAUSED_MIGRATION",
    "VIR_DOMAIN_PAUSED_STARTING_UP",
    "VIR_DOMAIN_PAUSED_POSTCOPY",
    "VIR_DOMAIN_PAUSED_POSTCOPY_FAILED",
    "VIR_DOMAIN_JOB_UNBOUNDED",
    "VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT",
    "VIR_DOMAIN_JOB_OPERATION_SAVE",
    "VIR_DOMAIN_EVENT_STARTED_BOOTED",
    "VIR_DOMAIN_EVENT_STARTED_RESTORED",
    "VIR_DOMAIN_EVENT_STARTED_FROM_SNAPSHOT",
    "VIR_DOMAIN_EVENT_STARTED_WAKEUP",
    "VIR_DOMAIN_METADATA_ELEMENT",
    "VIR_DOMAIN_AFFECT_LIVE",
    "VIR_CONNECT_LIST_DOMAINS_ACTIVE",
    "VIR_ERR_NO_DOMAIN",
    "VIR_ERR_OPERATION_DENIED",
    "VIR_ERR_OPERATION_INVALID",
    "VIR_ERR_OPERATION_UNSUPPORTED",
    "VIR_ERR_NO_CONNECT",
]
NUMBERS = {name: number for number, name in enumerate(NAMES, 1)} | {"VIR_DOMAIN_JOB_NONE": 0}


class LibvirtError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"libvirt error {code}")
        self.code = code

    def get_error_code(self) -> int:
        return self.code


class Domain:
    """One guest. `job` is jobStats' answer, `now` state and reason; None: there is no such domain."""

    job: dict[str, int]
    now: tuple[int, int] | None
    job_fails = ""
    """The error that `jobStats` raises."""

    def jobStats(self, flags: int) -> dict[str, int]:  # noqa: N802 - libvirt's names
        if self.job_fails:
            raise LibvirtError(NUMBERS[self.job_fails])
        if not self.isActive():
            raise LibvirtError(NUMBERS["VIR_ERR_OPERATION_INVALID"])
        return self.job

    def state(self, flags: int) -> list[int]:
        assert self.now is not None
        return list(self.now)

    def UUIDString(self) -> str:  # noqa: N802
        return GUEST

    def __init__(self) -> None:
        self.metadata = ""
        self.may_write = True
        self.writes = 0

    def isActive(self) -> int:  # noqa: N802
        return int(self.state(0)[0] != NUMBERS["VIR_DOMAIN_SHUTOFF"])

    def XMLDesc(self, flags: int) -> str:  # noqa: N802
        return f"<domain><uuid>{GUEST}</uuid><metadata>{self.metadata}</metadata></domain>"

    def bears_mark(self, host: str) -> None:
        """As that host has made it."""
        self.setMetadata(
            NUMBERS["VIR_DOMAIN_METADATA_ELEMENT"],
            domain_xml.new_origin(host),
            domain_xml.ORIGIN_PREFIX,
            domain_xml.ORIGIN,
            NUMBERS["VIR_DOMAIN_AFFECT_LIVE"],
        )

    def setMetadata(self, kind: int, element: str, prefix: str, uri: str, flags: int) -> None:  # noqa: N802
        assert (kind, flags) == (NUMBERS["VIR_DOMAIN_METADATA_ELEMENT"], NUMBERS["VIR_DOMAIN_AFFECT_LIVE"])
        self.writes += 1
        if not self.may_write:
            raise LibvirtError(NUMBERS["VIR_ERR_OPERATION_DENIED"])
        self.metadata = element.replace("<origin", f"<{prefix}:origin xmlns:{prefix}='{uri}'")


class Libvirt(SimpleNamespace):
    """As much of the module as is used. `is_up` says whether the daemon takes connections."""

    def __init__(self) -> None:
        super().__init__(**NUMBERS, libvirtError=LibvirtError)
        self.is_up = True
        self.domain = Domain()
        self.domain.job, self.domain.now = {"type": 0}, (self.VIR_DOMAIN_RUNNING, 0)
        self.heard: dict[int, Callable[..., None]] = {}
        self.closed: Callable[..., None] | None = None
        self.connections = 0
        self.fails = ""
        """The function that does."""
        self.left_open = 0
        """Connections that are not closed, or have a callback yet."""

    def virEventRegisterDefaultImpl(self) -> None: ...  # noqa: N802

    def virEventRunDefaultImpl(self) -> None:  # noqa: N802
        threading.Event().wait(0.05)

    def registerErrorHandler(self, handler: object, opaque: object) -> None: ...  # noqa: N802

    def open(self, uri: str) -> Any:
        if not self.is_up:
            raise LibvirtError(self.VIR_ERR_NO_CONNECT)
        self.connections += 1
        self.left_open += 1
        return self

    def isAlive(self) -> int:  # noqa: N802
        return int(self.is_up)

    def setKeepAlive(self, interval: int, count: int) -> None: ...  # noqa: N802

    def registerCloseCallback(self, callback: Callable[..., None], opaque: object) -> None:  # noqa: N802
        self.closed = callback

    def unregisterCloseCallback(self) -> None:  # noqa: N802
        self.closed = None
        if not self.is_up:
            raise LibvirtError(self.VIR_ERR_NO_CONNECT)

    def domainEventRegisterAny(self, domain: object, kind: int, callback: Callable[..., None], _: object) -> int:  # noqa: N802
        if self.fails == "domainEventRegisterAny" and self.heard:  # the second one
            raise LibvirtError(self.VIR_ERR_OPERATION_DENIED)
        self.heard[kind] = callback
        return kind

    def domainEventDeregisterAny(self, callback: int) -> None:  # noqa: N802
        del self.heard[callback]
        if not self.is_up:
            raise LibvirtError(self.VIR_ERR_NO_CONNECT)

    def lookupByUUIDString(self, uuid: str) -> Domain:  # noqa: N802
        if self.domain.now is None:
            raise LibvirtError(self.VIR_ERR_NO_DOMAIN)
        return self.domain

    def listAllDomains(self, flags: int) -> list[Domain]:  # noqa: N802
        if self.fails == "listAllDomains":
            raise LibvirtError(self.VIR_ERR_OPERATION_DENIED)
        return [] if self.domain.now is None else [self.domain]

    def close(self) -> None:
        if not self.heard and self.closed is None:
            self.left_open -= 1

    def say(self, event: str, detail: str) -> None:
        number = NUMBERS[f"VIR_DOMAIN_EVENT_{event}"], NUMBERS[f"VIR_DOMAIN_EVENT_{event}_{detail}"]
        self.heard[self.VIR_DOMAIN_EVENT_ID_LIFECYCLE](self, self.domain, *number, None)


class Heard:
    """The agent's end."""

    def __init__(self) -> None:
        self.events: list[MigrationEvent] = []
        self.underway: list[tuple[str, str]] = []

    def tell(self, event: MigrationEvent) -> None:
        self.events.append(event)
        if event.phase is Phase.ROLLBACK:
            raise OperatorError("the events behind this one are told all the same")
        if event.phase is Phase.SUSPENDED:
            raise OSError("so are they when it is not one of our own errors")

    def words(self) -> list[tuple[str, str | None]]:
        return [(event.phase.value, event.role) for event in self.events]


@pytest.fixture
def libvirt(monkeypatch: pytest.MonkeyPatch) -> Libvirt:
    fake = Libvirt()
    monkeypatch.setitem(sys.modules, "libvirt", fake)
    monkeypatch.setattr(libvirt_events, "_LOOP", [])
    monkeypatch.setattr(libvirt_events, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(libvirt_events, "RECONNECT_SECONDS", 0.01)
    return fake


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def descriptions(tmp_path: Path) -> Iterator[Descriptions]:
    with closing(Journal(tmp_path / "journal.sqlite")) as journal:
        yield Descriptions(journal)


@pytest.fixture
def host(libvirt: Libvirt, heard: Heard, descriptions: Descriptions) -> Iterator[LibvirtHost]:
    made = LibvirtHost("qemu:///system", "host-a", descriptions)
    polls: list[None] = []
    real = made._poll
    made._poll = lambda: polls.append(real())  # type: ignore[method-assign, func-returns-value]
    made.start(heard.tell, lambda: heard.underway)
    wait_until(lambda: len(polls) > 1, "the connection, and what is asked when it is made")
    yield made
    made.stop()


SAID = {
    ("STARTED", "MIGRATED"): [("started", "destination")],
    ("SUSPENDED", "MIGRATED"): [("suspended", "source")],
    ("SUSPENDED", "PAUSED"): [("resumed", "destination")],
    ("RESUMED", "MIGRATED"): [("resumed", None)],
    ("RESUMED", "UNPAUSED"): [("resumed", "source")],
    ("RESUMED", "POSTCOPY"): [("resumed", "destination")],
    ("RESUMED", "FROM_SNAPSHOT"): [("resumed", "source")],
    ("STOPPED", "MIGRATED"): [("stopped", "source")],
    ("STOPPED", "FAILED"): [("stopped", "destination")],
    ("STOPPED", "DESTROYED"): [("rollback", "source"), ("stopped", "destination")],
    ("STOPPED", "SHUTDOWN"): [("rollback", "source"), ("stopped", "destination")],
    ("STOPPED", "CRASHED"): [("rollback", "source"), ("stopped", "destination")],
}


@pytest.mark.parametrize(("said", "words"), SAID.items(), ids=lambda each: "/".join(map(str, each)))
@pytest.mark.usefixtures("host")
def test_event_in_our_words(
    libvirt: Libvirt, heard: Heard, said: tuple[str, str], words: list[tuple[str, str | None]]
) -> None:
    libvirt.say(*said)
    wait_until(lambda: len(heard.events) == len(words), "the words")
    assert heard.words() == words
    assert {event.guest for event in heard.events} == {GUEST}


@pytest.mark.usefixtures("host")
def test_words_behind_one_that_fails_are_told(libvirt: Libvirt, heard: Heard) -> None:
    for said in (("SUSPENDED", "MIGRATED"), ("STOPPED", "MIGRATED")):
        libvirt.say(*said)
    wait_until(lambda: heard.words() == [("suspended", "source"), ("stopped", "source")], "both words")


@pytest.mark.usefixtures("host")
def test_guest_whose_memory_is_copied_leaves_unless_it_is_saved(libvirt: Libvirt, heard: Heard) -> None:
    for words, operation in ((1, "SAVE"), (3, "MIGRATION_OUT")):
        job = {"type": "UNBOUNDED", "operation": f"OPERATION_{operation}"}
        libvirt.domain.job = {name: NUMBERS[f"VIR_DOMAIN_JOB_{value}"] for name, value in job.items()}
        libvirt.heard[libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION](libvirt, libvirt.domain, 1, None)
        libvirt.say("RESUMED", "UNPAUSED")
        wait_until(lambda count=words: len(heard.events) == count, "the word behind it")
    assert heard.words() == [("resumed", "source"), ("outgoing", "source"), ("resumed", "source")]


@pytest.mark.usefixtures("host")
def test_pause_waits_for_no_question_about_a_guest_that_is_known_to_leave(
    libvirt: Libvirt, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU tells of an iteration right before the pause, and answers when it has drained its disks."""
    asked: list[str] = []
    monkeypatch.setattr(
        libvirt.domain, "jobStats", lambda flags: (asked.append(threading.current_thread().name), {})[1]
    )
    heard.underway = [(GUEST, "source")]
    for _ in range(3):
        libvirt.heard[libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION](libvirt, libvirt.domain, 1, None)
    libvirt.say("SUSPENDED", "MIGRATED")
    wait_until(lambda: ("suspended", "source") in heard.words(), "the pause")
    assert set(asked) <= {"sami-libvirt"}, "who polls may wait"


JOBS = {
    "in an outgoing job": (
        {"type": "UNBOUNDED", "operation": "OPERATION_MIGRATION_OUT"},
        ("RUNNING", None),
        "outgoing",
        True,
    ),
    "in another job": ({"type": "UNBOUNDED", "operation": "OPERATION_SAVE"}, ("RUNNING", None), None, True),
    "runs, no job": ({}, ("RUNNING", None), "rollback", True),
    "paused by its user, no job": ({}, ("PAUSED", "USER"), "rollback", True),
    "asleep, no job": ({}, ("PMSUSPENDED", None), "rollback", True),
    "paused for the move": ({}, ("PAUSED", "MIGRATION"), None, False),
    "not there yet": ({}, ("PAUSED", "STARTING_UP"), None, False),
    "in post-copy": ({}, ("PAUSED", "POSTCOPY"), None, False),
    "lost in post-copy": ({}, ("PAUSED", "POSTCOPY_FAILED"), None, False),
    "off, and defined yet": ({}, ("SHUTOFF", None), "stopped", False),
    "gone": ({}, None, "stopped", False),
}


@pytest.mark.parametrize(("job", "now", "word", "is_here"), JOBS.values(), ids=JOBS)
def test_guest_on_its_way_is_asked_for(
    libvirt: Libvirt,
    heard: Heard,
    host: LibvirtHost,
    job: dict[str, str],
    now: tuple[str, str | None] | None,
    word: str | None,
    is_here: bool,
) -> None:
    libvirt.domain.job = {name: NUMBERS[f"VIR_DOMAIN_JOB_{value}"] for name, value in job.items()}
    if now is None:
        libvirt.domain.now = None
    else:
        reason = NUMBERS[f"VIR_DOMAIN_PAUSED_{now[1]}"] if now[1] else 0
        libvirt.domain.now = (NUMBERS[f"VIR_DOMAIN_{now[0]}"], reason)
    phase = host._job(GUEST)
    assert (phase.value if phase else None) == word
    assert host.is_leaving(GUEST) == (word == "outgoing")
    assert host.is_here(GUEST) is is_here
    heard.underway = [(GUEST, "source")]
    if word is not None:
        wait_until(lambda: heard.events, "the word that no event says")
        assert set(heard.words()) == {(word, "source")}


@pytest.mark.parametrize(
    ("now", "word"),
    [
        (("RUNNING", None), "resumed"),
        (("PAUSED", "USER"), "resumed"),
        (("PMSUSPENDED", None), "resumed"),
        (("SHUTOFF", None), "stopped"),
        (None, "stopped"),
    ],
)
def test_what_was_missed_while_the_daemon_was_away_is_asked_for(
    libvirt: Libvirt, heard: Heard, host: LibvirtHost, now: tuple[str, str | None] | None, word: str
) -> None:
    heard.underway = [(GUEST, "destination")]
    wait_until(lambda: libvirt.domain.metadata and host._descriptions.get(GUEST), "the guest to be marked")
    libvirt.is_up = False
    assert libvirt.closed is not None
    libvirt.closed(libvirt, 1, None)
    wait_until(lambda: host._connection is None, "the end of the connection")
    assert host.is_leaving(GUEST) is None
    assert host.is_here(GUEST) is None
    assert host.description(GUEST) == libvirt.domain.XMLDesc(0)
    assert host.description(str(uuid.uuid4())) is None
    if now is None:
        libvirt.domain.now = None
    else:
        libvirt.domain.now = (NUMBERS[f"VIR_DOMAIN_{now[0]}"], NUMBERS[f"VIR_DOMAIN_PAUSED_{now[1]}"] if now[1] else 0)
    libvirt.is_up = True
    expected = [(word, "destination")] + ([("stopped", "source")] if word == "stopped" else [])
    wait_until(lambda: len(heard.events) == len(expected), "what had been missed")
    assert heard.words() == expected
    assert (libvirt.connections, libvirt.left_open) == (2, 1)


def test_guest_of_which_it_is_not_known_whether_it_moves_on_is_not_said_to_come(
    libvirt: Libvirt, heard: Heard, descriptions: Descriptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    def jobStats(domain: Domain, flags: int) -> dict[str, int]:  # noqa: N802
        asked.set()
        raise LibvirtError(NUMBERS["VIR_ERR_OPERATION_DENIED"])

    monkeypatch.setattr(Domain, "jobStats", jobStats)
    libvirt.domain.bears_mark("host-z")
    host = LibvirtHost("qemu:///system", "host-a", descriptions)
    host.start(heard.tell, lambda: heard.underway)
    assert asked.wait(10)
    host.stop()
    assert heard.words() == []


@pytest.mark.parametrize("fails", ["domainEventRegisterAny", "listAllDomains"])
def test_connection_that_is_given_up_is_closed(libvirt: Libvirt, host: LibvirtHost, fails: str) -> None:
    libvirt.fails = fails
    assert libvirt.closed is not None
    libvirt.closed(libvirt, 1, None)
    wait_until(lambda: libvirt.connections > 5, "some tries to connect anew")
    libvirt.fails = ""
    wait_until(lambda: host._connection is not None and libvirt.left_open == 1, "all others to be closed")


def test_agent_that_starts_while_the_daemon_is_away_knows_the_guests_of_the_one_before(
    libvirt: Libvirt, heard: Heard, host: LibvirtHost, tmp_path: Path
) -> None:
    """A guest leaves without its daemon, and the agent may be killed meanwhile: nobody else knows its token then."""
    wait_until(lambda: libvirt.domain.metadata and host._descriptions.get(GUEST), "the guest to be marked")
    host.stop()
    libvirt.is_up = False
    with closing(Journal(tmp_path / "journal.sqlite")) as journal:
        successor = LibvirtHost("qemu:///system", "host-a", Descriptions(journal))
        assert successor.description(GUEST) == libvirt.domain.XMLDesc(0)
        assert successor.is_leaving(GUEST) is None
        successor.start(heard.tell, lambda: heard.underway)
        libvirt.domain.now, libvirt.is_up = None, True
        wait_until(lambda: not journal.descriptions(), "those that are not here any more to be forgotten")
        successor.stop()


def test_guest_that_ends_is_described_no_more(libvirt: Libvirt, host: LibvirtHost, tmp_path: Path) -> None:
    wait_until(lambda: libvirt.domain.metadata and host._descriptions.get(GUEST), "the guest to be marked")
    with closing(Journal(tmp_path / "journal.sqlite")) as journal:
        assert set(journal.descriptions()) == {GUEST}
        libvirt.domain.now = None
        libvirt.say("STOPPED", "SHUTDOWN")
        wait_until(lambda: not journal.descriptions(), "it to be forgotten")


def test_guest_that_boots_while_libvirt_lists_those_that_run_stays_described(
    libvirt: Libvirt, heard: Heard, descriptions: Descriptions
) -> None:
    runs, libvirt.domain.now = libvirt.domain.now, None
    descriptions.put(GUEST, "<domain>of before</domain>")

    def listed(flags: int) -> list[Domain]:
        libvirt.domain.now = runs
        libvirt.say("STARTED", "BOOTED")
        wait_until(
            lambda: "of before" not in (descriptions.get(GUEST) or "of before"), "the mark of the one that boots"
        )
        return []

    libvirt.listAllDomains = listed  # type: ignore[method-assign]
    host = LibvirtHost("qemu:///system", "host-a", descriptions)
    host.start(heard.tell, lambda: heard.underway)
    wait_until(lambda: "of before" not in (descriptions.get(GUEST) or "of before"), "the one that boots")
    wait_until(host._marks.empty, "all marks")
    host.stop()
    assert descriptions.get(GUEST) == libvirt.domain.XMLDesc(0)


def test_descriptions_outlast_a_journal_that_fails_and_are_written_when_it_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*of: object) -> None:
        raise JournalError("disk is full")

    with closing(Journal(tmp_path / "journal.sqlite")) as journal:
        descriptions = Descriptions(journal)
        descriptions.put(GUEST, "<domain>old</domain>")
        with monkeypatch.context() as patched:
            patched.setattr(journal, "keep_description", fail)
            descriptions.put(GUEST, "<domain>new</domain>")
        assert "disk is full" in caplog.text
        assert (descriptions.get(GUEST), Descriptions(journal).get(GUEST)) == (
            "<domain>new</domain>",
            "<domain>old</domain>",
        )
        descriptions.put(GUEST, "<domain>new</domain>")
        assert journal.descriptions() == {GUEST: "<domain>new</domain>"}
        with monkeypatch.context() as patched:
            patched.setattr(journal, "keep_description", fail)
            descriptions.pop(GUEST)
        assert descriptions.guests() == {GUEST}
        descriptions.pop(GUEST)
        assert journal.descriptions() == {}
        assert descriptions.guests() == set()


def test_description_that_is_too_large_to_be_read_is_not_kept(descriptions: Descriptions) -> None:
    descriptions.put(GUEST, "<domain/>")
    descriptions.put(GUEST, "x" * (domain_xml.MOST_OCTETS + 1))
    assert descriptions.get(GUEST) is None


@pytest.mark.parametrize("underway", [[], [(GUEST, "destination")]])
@pytest.mark.parametrize("reason", ["MIGRATION", "STARTING_UP"])
def test_incoming_guest_that_is_there_when_the_agent_starts_is_told(
    libvirt: Libvirt, heard: Heard, descriptions: Descriptions, reason: str, underway: list[tuple[str, str]]
) -> None:
    heard.underway = underway
    libvirt.domain.now = (libvirt.VIR_DOMAIN_PAUSED, NUMBERS[f"VIR_DOMAIN_PAUSED_{reason}"])
    libvirt.domain.job_fails = "VIR_ERR_OPERATION_UNSUPPORTED"  # as libvirt says it of a guest that comes
    libvirt.domain.bears_mark("host-z")
    libvirt.domain.may_write = False
    host = LibvirtHost("qemu:///system", "host-a", descriptions)
    host.start(heard.tell, lambda: heard.underway)
    wait_until(lambda: heard.events, "the guest's beginning")
    host.stop()
    assert heard.words() == [("started", "destination")]
    assert heard.events[0].is_incoming
    assert libvirt.domain.writes == 1, "libvirt would take half a minute to refuse it"


def test_guest_that_arrived_while_the_daemon_was_away_is_told_once(
    libvirt: Libvirt, heard: Heard, descriptions: Descriptions
) -> None:
    """Its session may end at once, and STARTED would open another one that nobody answers."""
    libvirt.domain.bears_mark("host-z")
    heard.underway = [(GUEST, "destination")]
    host = LibvirtHost("qemu:///system", "host-a", descriptions)
    host.start(heard.tell, lambda: heard.underway)
    wait_until(lambda: descriptions.get(GUEST), "the mark, which comes behind the words")
    host.stop()
    assert heard.words() == [("resumed", "destination")]


@pytest.mark.parametrize(
    ("why", "mark"),
    [
        ("MIGRATION", "host-a"),
        ("POSTCOPY", "host-a"),
        pytest.param("MIGRATION", "host-z", id="it moves on before it could be marked, and does not come"),
    ],
)
def test_leaving_guest_that_is_paused_when_the_agent_starts_is_told(
    libvirt: Libvirt, heard: Heard, descriptions: Descriptions, why: str, mark: str
) -> None:
    libvirt.domain.now = (libvirt.VIR_DOMAIN_PAUSED, NUMBERS[f"VIR_DOMAIN_PAUSED_{why}"])
    libvirt.domain.job = {
        "type": libvirt.VIR_DOMAIN_JOB_UNBOUNDED, "operation": libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT
    }  # fmt: skip
    libvirt.domain.bears_mark(mark)
    libvirt.domain.may_write = False
    host = LibvirtHost("qemu:///system", "host-a", descriptions)
    host.start(heard.tell, lambda: heard.underway)
    wait_until(lambda: len(heard.events) == 2, "the pause")
    host.stop()
    assert heard.words() == [("outgoing", "source"), ("suspended", "source")]


def test_incoming_guest_is_not_asked_for_while_the_connection_lasts(
    libvirt: Libvirt, heard: Heard, host: LibvirtHost
) -> None:
    asked: list[str] = []
    libvirt.lookupByUUIDString = asked.append  # type: ignore[method-assign]
    polls: list[None] = []
    real, host._poll = host._poll, lambda: polls.append(real())  # type: ignore[method-assign]
    heard.underway = [(GUEST, "destination")]
    wait_until(lambda: len(polls) > 3, "some polls")
    assert asked == [], "it may answer only when its hooks have returned"


def test_libvirt_python_that_is_missing_is_said_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, descriptions: Descriptions
) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(NotAvailable, match="extra `libvirt`"):
        LibvirtHost("qemu:///system", "host-a", descriptions)


def origin(libvirt: Libvirt) -> Origin | None:
    return domain_xml.origin_of(libvirt.domain.XMLDesc(0))


def test_guest_that_runs_is_marked_once_and_anew_when_that_is_asked(libvirt: Libvirt, host: LibvirtHost) -> None:
    wait_until(lambda: origin(libvirt) is not None, "the mark")
    first = origin(libvirt)
    assert first is not None
    assert first.host == "host-a"
    for said in (("RESUMED", "UNPAUSED"), ("STARTED", "BOOTED")):
        libvirt.say(*said)
    host.mark(GUEST)
    wait_until(lambda: libvirt.domain.writes == 2, "the new mark")
    assert origin(libvirt) != first
    assert first.token not in repr(first)


@pytest.mark.usefixtures("host")
def test_guest_that_came_is_marked_when_it_runs_here_and_not_before(libvirt: Libvirt) -> None:
    wait_until(lambda: libvirt.domain.writes == 1, "the mark")
    libvirt.domain.metadata = (
        f"<o:origin xmlns:o='{domain_xml.ORIGIN}' host='host-b' token='{'0' * 64}'/>"  # what came with it
    )
    libvirt.say("STARTED", "MIGRATED")
    libvirt.say("SUSPENDED", "MIGRATED")
    libvirt.say("RESUMED", "POSTCOPY")
    time.sleep(0.1)  # nothing is to happen
    assert libvirt.domain.writes == 1
    libvirt.say("RESUMED", "MIGRATED")
    wait_until(lambda: libvirt.domain.writes == 2, "the mark")
    found = origin(libvirt)
    assert found is not None
    assert found.host == "host-a"


@pytest.mark.usefixtures("host")
def test_guest_that_could_not_be_marked_is_marked_some_time_later(
    libvirt: Libvirt, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long job had it, and no event tells that this is over."""
    monkeypatch.setattr(libvirt_events, "MARK_AGAIN_SECONDS", 0.01)
    wait_until(lambda: libvirt.domain.writes == 1, "the mark")
    libvirt.domain.metadata, libvirt.domain.may_write = "", False
    libvirt.say("STARTED", "BOOTED")
    wait_until(lambda: libvirt.domain.writes >= 3, "tries")
    libvirt.domain.may_write = True
    wait_until(lambda: libvirt.domain.metadata, "the mark")
    assert caplog.text.count("cannot be carried away from here") == 1


def test_new_mark_that_was_refused_is_made_when_the_guest_may_be_marked(libvirt: Libvirt, host: LibvirtHost) -> None:
    wait_until(lambda: libvirt.domain.writes == 1, "the mark")
    first, libvirt.domain.may_write = origin(libvirt), False
    host.mark(GUEST)
    wait_until(lambda: GUEST in host._unmarked, "a try")
    libvirt.domain.may_write = True
    libvirt.say("RESUMED", "UNPAUSED")
    wait_until(lambda: origin(libvirt) != first, "the new mark")


def test_guest_that_takes_long_to_be_refused_is_tried_again_when_the_others_have_had_their_turn(
    libvirt: Libvirt, host: LibvirtHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until(lambda: libvirt.domain.writes == 1, "the mark")
    polls, may_end = threading.Semaphore(0), threading.Event()
    real = host._mark_again
    monkeypatch.setattr(host, "_mark_again", lambda: (real(), polls.release()))
    monkeypatch.setattr(libvirt_events, "MARK_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(host, "_mark", lambda guest, is_new: may_end.wait())
    host._unmarked = {GUEST: Mark.THERE, OTHER: Mark.THERE}
    for _ in range(10):
        polls.acquire()
    assert host._marks.qsize() <= 2
    may_end.set()


@pytest.mark.usefixtures("host")
def test_guest_that_cannot_be_marked_is_named_and_the_next_one_is_marked(
    libvirt: Libvirt, caplog: pytest.LogCaptureFixture
) -> None:
    wait_until(lambda: libvirt.domain.writes == 1, "the mark")
    libvirt.domain.metadata, libvirt.domain.may_write = "", False
    libvirt.say("STARTED", "BOOTED")
    wait_until(lambda: libvirt.domain.writes == 2, "a try")
    libvirt.domain.may_write = True
    libvirt.say("STARTED", "BOOTED")
    wait_until(lambda: libvirt.domain.writes == 3, "the mark")
    assert "cannot be carried away from here" in caplog.text
