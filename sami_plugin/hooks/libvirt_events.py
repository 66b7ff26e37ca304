"""What libvirt says of the guests of this host, in our words, and what it is asked.

Four threads, each with one thing to do: one runs libvirt's event loop, whose callbacks only queue; one takes them from
the queue and tells; one keeps the connection, and asks from time to time about guests that are on their way, because an
abort or a dead destination gives the source no event at all; one writes into the description of each guest that runs
here that it does (`Origin`), before the guest leaves, for then it is too late: from a migration's first moment to its
last libvirt lets nobody write there.

What a host sees in which case stands in the table that tests/libvirt goes through. libvirt-python is imported when it
is used: it has to be built against the host's libvirt, and not every host has one.
"""

from __future__ import annotations

import enum
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from sami_plugin.errors import NotAvailable, RepresentationError, SamiError
from sami_plugin.hooks import domain_xml
from sami_plugin.hooks.descriptions import Descriptions
from sami_plugin.model.migration import MigrationEvent, Origin, Phase

LOG = logging.getLogger(__name__)

KEEPALIVE_SECONDS, KEEPALIVE_COUNT = 5, 3
RECONNECT_SECONDS = 1.0
POLL_SECONDS = 0.5
MARK_AGAIN_SECONDS = 30.0

Tell = Callable[[MigrationEvent], object]
Underway = Callable[[], Iterable[tuple[str, str]]]
"""The guests that are on their way and the role of this host in it, "source" or "destination"."""

SOURCE, DESTINATION = "source", "destination"


class Mark(enum.Enum):
    """What is to become of the mark of a guest."""

    THERE = enum.auto()
    """It is to have one of this host."""
    NEW = enum.auto()
    """It is to have another one than it has."""
    GONE = enum.auto()
    """It may not be here any more; then nothing is to be known of it."""
    MISSED = enum.auto()
    """As GONE, and nobody may have said so."""


Words = tuple[tuple[Phase, str | None], ...]
"""What an event says, and which role of this host it is about."""
COPIES: Words = ((Phase.OUTGOING, SOURCE),)
"""If it is a job that moves the guest."""


class LibvirtHost:
    """This host's libvirt. Works by itself from `start` on, through restarts of the daemon, until `stop`."""

    def __init__(self, uri: str, host: str, descriptions: Descriptions) -> None:
        """`host` is this host's name among the agents.

        :raises NotAvailable: there is no libvirt-python.
        """
        try:
            import libvirt
        except ImportError as error:
            raise NotAvailable(
                f"[libvirt] uri is set, but libvirt-python cannot be imported ({error}); install the extra `libvirt`"
            ) from error
        self._libvirt: Any = libvirt
        self._uri = uri
        self._host = host
        self._phases = _phases(libvirt)
        self._runs = _events_of_guests_that_run(libvirt)
        self._lives = (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_PMSUSPENDED)
        """Neither paused nor ended: a guest that sleeps wakes up where it is."""
        self._connection: Any = None
        self._callbacks: list[int] = []
        self._descriptions = descriptions
        self._queue: queue.SimpleQueue[tuple[str, Words] | None] = queue.SimpleQueue()
        self._marks: queue.SimpleQueue[tuple[str, Mark] | None] = queue.SimpleQueue()
        self._unmarked: dict[str, Mark] = {}
        """Guests with which that was tried in vain."""
        self._mark_again_at = 0.0
        self._is_stopping = threading.Event()
        self._is_lost = threading.Event()
        self._tell: Tell = lambda event: None
        self._underway: Underway = tuple
        self._threads: list[threading.Thread] = []

    def start(self, tell: Tell, underway: Underway) -> None:
        """`tell` is called from a thread of its own and must not block for long."""
        self._tell, self._underway = tell, underway
        _run_event_loop(self._libvirt)
        works = (
            (self._keep, "sami-libvirt"),
            (self._pass_on, "sami-libvirt-tell"),
            (self._mark_all, "sami-libvirt-mark"),
        )
        for work, name in works:
            thread = threading.Thread(target=work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Tells nothing any more."""
        self._is_stopping.set()
        self._is_lost.set()
        self._queue.put(None)
        self._marks.put(None)
        for thread in self._threads:
            thread.join(RECONNECT_SECONDS)

    def is_leaving(self, guest: str) -> bool | None:
        """Whether the guest is in a job that moves it away: True from the migration's first moment on.

        None while libvirt cannot be asked. Must not be asked of a guest that comes here: libvirt answers only when its
        hooks have returned.
        """
        phase = self._job(guest)
        return phase is Phase.OUTGOING if phase is not None or self._answers() else None

    def is_here(self, guest: str) -> bool | None:
        """Whether the guest is here, and neither on its way here nor paused to be moved away; None as for `is_leaving`.

        Of one that comes it is answered when the hypervisor's hooks have returned.
        """
        connection = self._connection
        if connection is None:
            return None
        try:
            return self._stays(*connection.lookupByUUIDString(guest).state(0))
        except self._libvirt.libvirtError as error:
            return False if self._absence(error) is Phase.STOPPED else None

    def _answers(self) -> bool:
        connection = self._connection
        try:
            return connection is not None and connection.isAlive() == 1
        except self._libvirt.libvirtError:  # it was closed in that moment
            return False

    def description(self, guest: str) -> str | None:
        """The guest's XML, as it was last while libvirt cannot be asked; None where it is not here."""
        connection = self._connection
        if connection is None:
            return self._descriptions.get(guest)
        try:
            found: str = connection.lookupByUUIDString(guest).XMLDesc(0)
            return found
        except self._libvirt.libvirtError as error:
            LOG.warning("guest %s: libvirt does not describe it: %s", guest, error)
            return None if self._answers() else self._descriptions.get(guest)

    def mark(self, guest: str) -> None:
        """Gives the guest a new token, some time: another host has learned the one it has. Returns at once."""
        self._marks.put((guest, Mark.NEW))

    # --- The connection, and questions from time to time

    def _keep(self) -> None:
        is_told = False
        while not self._is_stopping.is_set():
            try:
                self._connect()
            except self._libvirt.libvirtError as error:
                if not is_told:
                    LOG.warning("libvirt %s cannot be reached, tried again every second: %s", self._uri, error)
                is_told = True
                self._is_stopping.wait(RECONNECT_SECONDS)
                continue
            is_told = False
            LOG.info("libvirt %s tells of migrations from now on", self._uri)
            try:
                arrived = self._settle()
                for domain in self._connection.listAllDomains(self._libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                    # The session of one that has arrived may be over by now; a word too many would open another.
                    if domain.UUIDString() not in arrived:
                        self._say_what_was_missed(domain)
                    self._marks.put((domain.UUIDString(), Mark.THERE))
                for guest in self._descriptions.guests():
                    self._marks.put((guest, Mark.MISSED))
                while not self._is_lost.wait(POLL_SECONDS):
                    self._poll()
                    self._mark_again()
            except Exception:  # as in `_say`
                LOG.exception("libvirt %s is connected to anew", self._uri)
                self._is_stopping.wait(RECONNECT_SECONDS)
            self._disconnect()

    def _connect(self) -> None:
        libvirt = self._libvirt
        self._is_lost.clear()
        connection = libvirt.open(self._uri)
        try:
            connection.setKeepAlive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT)
            connection.registerCloseCallback(lambda *_: self._is_lost.set(), None)
            for kind, callback in (
                (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._heard),
                (libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION, self._copies),
            ):
                self._callbacks.append(connection.domainEventRegisterAny(None, kind, callback, None))
        except libvirt.libvirtError:
            self._close(connection)
            raise
        self._connection = connection
        if self._is_stopping.is_set():
            self._is_lost.set()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if not self._is_stopping.is_set():
            LOG.warning("libvirt %s ended the connection", self._uri)
        self._close(connection)

    def _close(self, connection: Any) -> None:
        """Whether it has ended already or not: as long as it has a callback, its descriptors stay open."""
        callbacks, self._callbacks = self._callbacks, []
        forget = [functools.partial(connection.domainEventDeregisterAny, callback) for callback in callbacks]
        for step in (*forget, connection.unregisterCloseCallback, connection.close):
            try:
                step()
            except self._libvirt.libvirtError as error:
                LOG.debug("libvirt %s was gone already: %s", self._uri, error)

    def _poll(self) -> None:
        """Tells what no event says: a job of the source that began or is over."""
        for guest, role in self._underway():
            if role == SOURCE:
                phase = self._job(guest)
                if phase is not None:
                    self._say(MigrationEvent(guest, phase, role=SOURCE))

    def _settle(self) -> set[str]:
        """After a connection was made: what events may have been missed. Which guests it said to have arrived."""
        self._poll()
        arrived = set()
        for guest, role in self._underway():
            if role == DESTINATION:
                phase = self._arrival(guest)
                if phase is not None:
                    self._say(MigrationEvent(guest, phase, role=DESTINATION))
                if phase is Phase.RESUMED:
                    arrived.add(guest)
        return arrived

    def _say_what_was_missed(self, domain: Any) -> None:
        """Of a guest that moves, or has come, when the connection is made, what would have been said of it by then."""
        libvirt, guest = self._libvirt, domain.UUIDString()
        try:
            state, reason = domain.state(0)
            origin = self._origin(domain.XMLDesc(0))
            is_unmarked = origin is not None and origin.host != self._host  # since it came
            for_a_job = (libvirt.VIR_DOMAIN_PAUSED_MIGRATION, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY)
            is_paused = state == libvirt.VIR_DOMAIN_PAUSED and reason in for_a_job
            is_leaving = (is_unmarked or is_paused) and self._moves_on(domain)
        except libvirt.libvirtError as error:
            LOG.info("guest %s: libvirt does not say how it is: %s", guest, error)
            return
        if is_unmarked and not is_leaving:  # one that moves on before it could be marked does not come
            self._say(MigrationEvent(guest, Phase.STARTED, role=DESTINATION, is_incoming=True))
            if not self._comes(state, reason):
                self._say(MigrationEvent(guest, Phase.RESUMED, role=DESTINATION))
            return
        if is_paused and is_leaving:
            self._say(MigrationEvent(guest, Phase.OUTGOING, role=SOURCE))
            self._say(MigrationEvent(guest, Phase.SUSPENDED, role=SOURCE))

    def _job(self, guest: str) -> Phase | None:
        """What becomes of a guest of this source: OUTGOING, ROLLBACK, STOPPED, or None where that is not certain."""
        libvirt, connection = self._libvirt, self._connection
        if connection is None:
            return None
        try:
            domain = connection.lookupByUUIDString(guest)
            job = domain.jobStats(0)
            if job.get("type", libvirt.VIR_DOMAIN_JOB_NONE) != libvirt.VIR_DOMAIN_JOB_NONE:
                return Phase.OUTGOING if self._leaves(job) else None
            return Phase.ROLLBACK if self._stays(*domain.state(0)) else None
        except libvirt.libvirtError as error:
            return self._absence(error)

    def _moves_on(self, domain: Any) -> bool:
        """Whether a job moves the guest away, as far as libvirt says."""
        try:
            return self._leaves(domain.jobStats(0))
        except self._libvirt.libvirtError as error:
            # Of a guest that comes it says nothing but "migration statistics are available only on the source host".
            if error.get_error_code() == self._libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
                return False
            raise

    def _leaves(self, job: dict[str, Any]) -> bool:
        """Whether the job moves the guest away."""
        return job.get("operation") == self._libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT

    def _stays(self, state: int, reason: int) -> bool:
        """Whether a guest in this state is here, and not on its way from or to another host."""
        libvirt = self._libvirt
        if state != libvirt.VIR_DOMAIN_PAUSED:
            return state in self._lives
        # Between the end of the job and the next event, or for good after post-copy failed.
        return reason not in (
            libvirt.VIR_DOMAIN_PAUSED_STARTING_UP,
            libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
            libvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
            libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED,
        )

    def _arrival(self, guest: str) -> Phase | None:
        libvirt, connection = self._libvirt, self._connection
        try:
            state, reason = connection.lookupByUUIDString(guest).state(0)
        except libvirt.libvirtError as error:
            return self._absence(error)
        if self._comes(state, reason):
            return None
        return Phase.RESUMED if state in (*self._lives, libvirt.VIR_DOMAIN_PAUSED) else Phase.STOPPED

    def _comes(self, state: int, reason: int) -> bool:
        """Whether a guest in this state that moves here is still on its way."""
        libvirt = self._libvirt
        # The second is its QEMU's until that has answered, which takes long where it has much memory to prepare.
        is_coming = reason in (libvirt.VIR_DOMAIN_PAUSED_MIGRATION, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP)
        return state == libvirt.VIR_DOMAIN_PAUSED and is_coming

    def _absence(self, error: Any) -> Phase | None:
        # The second is jobStats' word for a guest that is defined and off, as it is left without --undefinesource.
        if error.get_error_code() in (self._libvirt.VIR_ERR_NO_DOMAIN, self._libvirt.VIR_ERR_OPERATION_INVALID):
            return Phase.STOPPED
        LOG.info("libvirt %s does not say how it is with a guest: %s", self._uri, error)
        return None

    # --- Which host a guest is on

    def _mark_all(self) -> None:
        while (wanted := self._marks.get()) is not None:
            guest, mark = wanted
            if mark is Mark.THERE:  # unless a new one is wanted still
                mark = self._unmarked.get(guest, mark)
            try:
                if mark in (Mark.GONE, Mark.MISSED):
                    if self._forget_gone(guest) and mark is Mark.MISSED:
                        self._say(MigrationEvent(guest, Phase.STOPPED, role=SOURCE))
                else:
                    self._mark(guest, is_new=mark is Mark.NEW)
                self._unmarked.pop(guest, None)
            except self._libvirt.libvirtError as error:
                if error.get_error_code() == self._libvirt.VIR_ERR_NO_DOMAIN:  # it ended meanwhile
                    self._unmarked.pop(guest, None)
                    continue
                if guest not in self._unmarked:
                    LOG.warning("guest %s: its flows cannot be carried away from here yet: %s", guest, error)
                self._unmarked[guest] = mark
            except Exception:  # as in `_say`
                LOG.exception("guest %s is not marked", guest)

    def _mark_again(self) -> None:
        """What could not be done while the guest was busy, with a migration that came to nothing for example."""
        # Each may take half a minute: the next round waits for the last one.
        if self._unmarked and self._marks.empty() and time.monotonic() >= self._mark_again_at:
            self._mark_again_at = time.monotonic() + MARK_AGAIN_SECONDS
            for wanted in tuple(self._unmarked.items()):
                self._marks.put(wanted)

    def _mark(self, guest: str, *, is_new: bool) -> None:
        """Blocks while libvirt moves the guest, up to half a minute."""
        libvirt, connection = self._libvirt, self._connection
        if connection is None:  # all are looked at when there is one again
            return
        domain = connection.lookupByUUIDString(guest)
        xml = domain.XMLDesc(0)
        if is_new or not self._is_marked(xml):
            if not is_new and self._comes(*domain.state(0)):  # it is marked when it has come
                return
            domain.setMetadata(
                libvirt.VIR_DOMAIN_METADATA_ELEMENT,
                domain_xml.new_origin(self._host),
                domain_xml.ORIGIN_PREFIX,
                domain_xml.ORIGIN,
                libvirt.VIR_DOMAIN_AFFECT_LIVE,
            )
            xml = domain.XMLDesc(0)
            LOG.debug("guest %s: its description says that it is on %s", guest, self._host)
        self._descriptions.put(guest, xml)

    def _forget_gone(self, guest: str) -> bool:
        """Whether libvirt has no such guest any more, or one that is off."""
        connection = self._connection
        if connection is None:
            return False
        try:
            is_gone = not connection.lookupByUUIDString(guest).isActive()
        except self._libvirt.libvirtError as error:
            is_gone = self._absence(error) is Phase.STOPPED
        if is_gone:
            self._descriptions.pop(guest)
        return is_gone

    def _is_marked(self, xml: str) -> bool:
        origin = self._origin(xml)
        return origin is not None and origin.host == self._host

    def _origin(self, xml: str) -> Origin | None:
        try:
            return domain_xml.origin_of(xml)
        except RepresentationError:
            return None

    # --- Events

    def _heard(self, connection: Any, domain: Any, event: int, detail: int, opaque: object) -> None:
        """In libvirt's own thread."""
        if (event, detail) in self._runs:
            self._marks.put((domain.UUIDString(), Mark.THERE))
        if event == self._libvirt.VIR_DOMAIN_EVENT_STOPPED:
            self._marks.put((domain.UUIDString(), Mark.GONE))
        if (event, detail) in self._phases:
            self._queue.put((domain.UUIDString(), self._phases[event, detail]))

    def _copies(self, connection: Any, domain: Any, iteration: int, opaque: object) -> None:
        """The guest's memory is being copied, to another host or into a file. In libvirt's own thread.

        Of a guest that its user had paused there is no other word before it has left.
        """
        self._queue.put((domain.UUIDString(), COPIES))

    def _pass_on(self) -> None:
        while (heard := self._queue.get()) is not None:
            guest, words = heard
            # Asked once: QEMU answers when it has a moment, and the guest's pause would wait behind that.
            if words == COPIES and ((guest, SOURCE) in self._underway() or self._job(guest) is not Phase.OUTGOING):
                continue
            for phase, role in words:
                self._say(MigrationEvent(guest, phase, role=role, is_incoming=phase is Phase.STARTED))

    def _say(self, event: MigrationEvent) -> None:
        try:
            self._tell(event)
        except SamiError as error:
            LOG.warning("guest %s, %s: %s", event.guest, event.phase.value, error)
        except Exception:  # of the system or our own: one guest's trouble must not end the thread of all
            LOG.exception("guest %s, %s", event.guest, event.phase.value)


def _phases(libvirt: Any) -> dict[tuple[int, int], Words]:
    """What each lifecycle event that concerns us says."""
    started, suspended = libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED
    resumed, stopped = libvirt.VIR_DOMAIN_EVENT_RESUMED, libvirt.VIR_DOMAIN_EVENT_STOPPED
    ends = (
        libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN,
        libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED,
        libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED,
    )
    return {
        # The hooks say it before, where they are installed.
        (started, libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED): ((Phase.STARTED, DESTINATION),),
        (suspended, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED): ((Phase.SUSPENDED, SOURCE),),
        # The incoming job is over, and the guest stays paused: --suspend, or its user had paused it.
        (suspended, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED): ((Phase.RESUMED, DESTINATION),),
        # On the source the same words, of whatever detail, take back SUSPENDED/MIGRATED.
        (resumed, libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED): ((Phase.RESUMED, None),),
        (resumed, libvirt.VIR_DOMAIN_EVENT_RESUMED_UNPAUSED): ((Phase.RESUMED, SOURCE),),
        (resumed, libvirt.VIR_DOMAIN_EVENT_RESUMED_FROM_SNAPSHOT): ((Phase.RESUMED, SOURCE),),
        (resumed, libvirt.VIR_DOMAIN_EVENT_RESUMED_POSTCOPY): ((Phase.RESUMED, DESTINATION),),
        (stopped, libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED): ((Phase.STOPPED, SOURCE),),
        (stopped, libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED): ((Phase.STOPPED, DESTINATION),),
        # It ended here: on the source it moves nowhere any more, on the destination a source's libvirtd that died lets
        # go of what had begun to come.
        **{(stopped, detail): ((Phase.ROLLBACK, SOURCE), (Phase.STOPPED, DESTINATION)) for detail in ends},
    }


def _events_of_guests_that_run(libvirt: Any) -> frozenset[tuple[int, int]]:
    """Those after which a guest runs here, or may, and libvirt lets its description be changed.

    Not STARTED/MIGRATED nor RESUMED/POSTCOPY: such a guest is still on its way, and its job goes on.
    """
    started, resumed = libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_RESUMED
    return frozenset(
        {
            (started, libvirt.VIR_DOMAIN_EVENT_STARTED_BOOTED),
            (started, libvirt.VIR_DOMAIN_EVENT_STARTED_RESTORED),
            (started, libvirt.VIR_DOMAIN_EVENT_STARTED_FROM_SNAPSHOT),
            (started, libvirt.VIR_DOMAIN_EVENT_STARTED_WAKEUP),
            (resumed, libvirt.VIR_DOMAIN_EVENT_RESUMED_UNPAUSED),
            (resumed, libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED),
            (resumed, libvirt.VIR_DOMAIN_EVENT_RESUMED_FROM_SNAPSHOT),
            (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED),
        }
    )


_LOOP: list[threading.Thread] = []
_LOOP_LOCK = threading.Lock()


def _run_event_loop(libvirt: Any) -> None:
    """libvirt has one event loop for a process, which has to be there before the first connection."""
    with _LOOP_LOCK:
        if _LOOP:
            return
        libvirt.virEventRegisterDefaultImpl()
        # Its own account of errors goes to stderr; each is raised as well.
        libvirt.registerErrorHandler(lambda *_: None, None)

        def run() -> None:
            while True:
                try:
                    libvirt.virEventRunDefaultImpl()
                except libvirt.libvirtError as error:
                    LOG.warning("libvirt's event loop: %s", error)

        _LOOP.append(threading.Thread(target=run, name="sami-libvirt-events", daemon=True))
        _LOOP[0].start()
