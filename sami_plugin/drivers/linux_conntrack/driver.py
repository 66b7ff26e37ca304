"""The Linux kernel's conntrack table as a SAMI driver."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sami_plugin import errors, privileged
from sami_plugin.drivers.base import Capabilities, FlowDriver, Watch
from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack import encode, expectations, probe
from sami_plugin.drivers.linux_conntrack.connections import Connections, identity_of, is_at, sysctl
from sami_plugin.drivers.linux_conntrack.decode import Decoded, Decoder
from sami_plugin.drivers.linux_conntrack.encode import Extra, Request
from sami_plugin.drivers.linux_conntrack.netlink import (
    GENERIC_OCTETS,
    HEADER_OCTETS,
    Connection,
    Messages,
    Offsets,
    Torn,
    attributes_of,
    failure,
)
from sami_plugin.drivers.linux_conntrack.watch import ConntrackWatch, EventsKeptOn, keep_events_on
from sami_plugin.drivers.linux_conntrack.windows import Waiting, WindowChecks
from sami_plugin.model.flows import (
    BARRED,
    TEMPLATES,
    Addresses,
    Batch,
    Omitted,
    Rows,
    Template,
    answers,
    are_anothers,
    has_end_in,
    holds_any,
    names,
)
from sami_plugin.model.keys import KeyIndex, key_words
from sami_plugin.model.protocols import GRE, PROTOCOLS, TCP
from sami_plugin.model.results import Outcome, Reason, Results, came_out, results
from sami_plugin.model.risk import HELPERS, MARKS
from sami_plugin.model.scope import Scope

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.intp]

TEMPLATES_OF_EVERY_KERNEL = frozenset(
    f"{protocol.kind}-{family}" for protocol in PROTOCOLS if protocol not in nl.OPTIONAL for family in protocol.families
)
"""What is carried wherever there is conntrack."""

_REASONS = {
    errno.EEXIST: Reason.EXISTS,
    errno.ENOENT: Reason.NO_ENTRY,
    errno.EOPNOTSUPP: Reason.NOT_SUPPORTED,
    errno.ENOMEM: Reason.OUT_OF_MEMORY,
    errno.ENOSPC: Reason.CHAIN_TOO_LONG,
    errno.EBUSY: Reason.BUSY,
    errno.EINVAL: Reason.INVALID,
    errno.ERANGE: Reason.INVALID,
    errno.EPERM: Reason.NOT_PERMITTED,
}
_EVENTS = "nf_conntrack_events"
_NOT_CARRIED = {
    "nf_conntrack_acct": "nf_conntrack_acct is on, and no kernel can be given counters: they begin at 0 where a guest "
    "goes; who adds up what the events of ended flows tell loses nothing. Other devices than a kernel get them with "
    "[linux_conntrack] accounting",
    "nf_conntrack_timestamp": "nf_conntrack_timestamp is on, and no kernel can be given a start: it is the time of a "
    "guest's move. Other devices than a kernel get it with [linux_conntrack] accounting",
}
"""By the switch that turns it on: what the kernel tells of a flow and cannot be given."""
_BODY = HEADER_OCTETS + GENERIC_OCTETS
_MOST_DUMPS = 5
# Inserting, finding the tuple taken, deleting what is in the way and inserting again may be overtaken by traffic or by
# a second row of the same key.
_MOST_INSERTS = 4
_OCTETS_AT_ONCE = 1 << 20
# Measured with 100,000 entries: asking for one costs about 1.6 times what a dump costs per entry of the table, and a
# dump has to walk all the table's buckets, however empty.
_GET_PER_DUMPED, _DUMP_FIXED = 1.6, 7000


class LinuxConntrackDriver(FlowDriver):
    """Exports, inserts, removes and watches entries of the kernel's conntrack table through ctnetlink.

    Needs CAP_NET_ADMIN in the user namespace that owns the network namespace, and CAP_SYS_ADMIN where that is not the
    agent's own. Windows and sequence numbers of TCP flows cannot be carried: inserted flows are tracked liberally,
    until both ends have spoken where the guest is.
    """

    def __init__(
        self,
        receive_octets: int = 8 << 20,
        watch_receive_octets: int = 32 << 20,
        capacity: int | None = None,
        *,
        accounting: bool = False,
    ) -> None:
        """The sizes are those of the sockets' receive buffers, for answers and for events between two `collect`s.

        `capacity` is how many entries there may be at the most, where that is to be less than the kernel's own limit.
        With `accounting` flows tell what the kernel counted of them and when they began, where it does.
        """
        self._accounting = accounting
        self._capacity = capacity
        self._connections = Connections(receive_octets)
        self._watch_receive_octets = watch_receive_octets
        self._lock = threading.Lock()
        self._attended: dict[str | None, tuple[tuple[int, int], EventsKeptOn]] = {}
        self._window_checks = WindowChecks(self._checked)

    def close(self) -> None:
        """Closes all idle sockets. Watches are closed by their owners."""
        self._window_checks.close()
        self._connections.close()
        while self._attended:
            self._attended.popitem()[1][1].close()

    def attend(self, namespace: str | None) -> None:
        """Makes entries able to tell events from now on; those that are older never will (nf_conntrack_events=2).

        Lets go of the namespaces that are gone, such as a router's: a socket in one keeps it alive.
        """
        self._connections.let_go()
        with self._lock:
            for known, (identity, kept_on) in list(self._attended.items()):
                if not is_at(known, identity):
                    del self._attended[known]
                    kept_on.close()
            if namespace not in self._attended:
                self._attended[namespace] = identity_of(namespace), keep_events_on(namespace)

    # --- what it can do

    def capabilities(self, scope: Scope | None = None) -> Capabilities:
        namespace = scope.namespace if scope is not None else None
        with self._connections.lend(namespace) as connection:
            in_use, capacity = _stats(connection)
            receive_octets = connection.receive_octets
        limits = [limit for limit in (capacity, self._capacity) if limit is not None]
        switches = privileged.in_namespace(namespace, lambda: {name: sysctl(name) for name in (_EVENTS, *_NOT_CARRIED)})
        found = probe.features()
        return Capabilities(
            templates=frozenset(name for name, template in TEMPLATES.items() if _is_carried(template)),
            can_watch=switches[_EVENTS] != 0,
            capacity=min(limits, default=None),
            in_use=in_use,
            device=_device(namespace),
            functions=found.functions,
            notes=tuple(_notes(found, switches, receive_octets)),
        )

    # --- what is there

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        waiting = self._window_checks.waiting(scope)
        for _ in range(_MOST_DUMPS):
            omitted: dict[str, Omitted] = {}
            expected: list[Batch] = []
            try:
                for part in self._dump(scope, scope.addresses if scope.is_shared else None):
                    if isinstance(part, Omitted):
                        _merge(omitted, part)
                        continue
                    batch = part.batch
                    is_barred = _is_barred(scope, batch)
                    if is_barred.any():
                        _merge(omitted, _omitted(batch.take(is_barred)))
                        batch = batch.take(~is_barred)
                    _ask_for_checks(batch, waiting)
                    if batch.template.is_extended:
                        has_master = batch.rows["masterProtocolIdentifier"] != 0
                        expected.append(batch.take(has_master))
                        batch = batch.take(~has_master)
                    if len(batch):
                        yield batch
            except Torn:
                continue
            # Behind their masters, without which nobody can put them in.
            yield from (batch for batch in expected if len(batch))
            with self._connections.lend(scope.namespace) as connection:
                yield from expectations.exported(connection, scope)
            yield from omitted.values()
            return
        raise errors.DeviceFailed(f"the conntrack table changed under {_MOST_DUMPS} dumps, so none is complete")

    def watch(self, scope: Scope) -> Watch:
        if privileged.in_namespace(scope.namespace, lambda: sysctl(_EVENTS)) == 0:
            raise errors.UndeclaredAbility("conntrack events are off; set net.netfilter.nf_conntrack_events to 2 or 1")
        decoder = self._decoder(scope, scope.addresses if scope.is_shared else None)

        def look(keys: Batch) -> list[Decoded]:
            waiting = self._window_checks.waiting(scope)  # who is checked meanwhile is among them
            with self._connections.lend(scope.namespace) as asking:
                found = _of_same_key(keys, self._look(asking, scope, keys)[1])
            for part in found:
                _ask_for_checks(part.batch, waiting)
            # What is barred counts as gone.
            admitted = (_without(part, _is_barred(scope, part.batch)) for part in found)
            return [part for part in admitted if len(part.batch)]

        with contextlib.ExitStack() as undo:
            connection = Connection(scope.namespace, self._watch_receive_octets)
            undo.callback(connection.close)
            beside = Connection(scope.namespace, self._watch_receive_octets // 8)
            undo.callback(beside.close)
            lend = functools.partial(self._connections.lend, scope.namespace)
            expected = expectations.ExpectationEvents(beside, scope, lend)
            watch = ConntrackWatch(connection, scope.zones.values(), decoder, look, expected)
            undo.pop_all()
            return watch

    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, Mask]:
        if not batch.template.is_flow:
            return Batch(batch.template, batch.template.empty(len(batch))), np.zeros(len(batch), bool)
        if batch.template.is_expectation:
            with self._connections.lend(scope.namespace) as connection:
                return expectations.read_back(connection, scope, batch)
        found = list(self._find(scope, batch))
        rows = _in_order(batch.template, len(batch), found)
        present = np.zeros(len(batch), bool)
        for part in found:
            present[part.numbers] = True
        return Batch(batch.template, rows), present

    # --- what changes it

    def insert(self, scope: Scope, batch: Batch) -> Results:
        # The kernel would say nothing: an insert of a protocol that it does not know succeeds without the ports.
        if not _is_carried(batch.template):
            return results(len(batch), Outcome.REFUSED, Reason.NOT_DECLARED)
        made = results(len(batch))
        _refuse(made, ~_has_zone(scope, batch), Reason.NOT_DECLARED)
        _refuse(made, ~has_end_in(batch, scope.addresses), Reason.FOREIGN_ADDRESS)
        _refuse(made, batch.rows["remainingTimeoutSeconds"] == 0, Reason.EXPIRED)
        if batch.template.is_expectation:
            _refuse(made, ~expectations.is_known(batch), Reason.NOT_SUPPORTED)
            self._ask_of_expected(expectations.insert, scope, batch, made)
            _refuse(made, came_out(made, Outcome.ABSENT), Reason.LOCAL_PORTS_OWN)
            return made
        _refuse(made, _is_barred(scope, batch), Reason.BARRED)
        if batch.template.protocol is GRE:
            _refuse(made, ~_has_room_for_keys(batch), Reason.INVALID)
        state = batch.template.protocol.state_field
        if state is not None:
            _refuse(made, nl.STATES_TO_KERNEL[state][batch.rows[state]] == nl.NO_STATE, Reason.INVALID)
        if batch.template.is_extended:
            batch = _with_own_masters(scope, batch)
        with self._connections.lend(scope.namespace) as connection:
            self._leave_to_neighbours(connection, scope, batch, made)
            _refuse(made, came_out(made, Outcome.ABSENT), Reason.LOCAL_PORTS_OWN)
            left = np.flatnonzero(came_out(made, Outcome.IMPORTED))
            expected: list[Batch] = []
            for attempt in range(_MOST_INSERTS):
                codes = _ask(connection, Request.INSERT, *_named(scope, batch, left))[0]
                _record(made, left, codes, connection)
                is_taken = codes == errno.EEXIST
                is_less = _take_less(batch, left, codes)
                if not (is_taken | is_less).any() or attempt == _MOST_INSERTS - 1:
                    break
                if batch.template.is_extended and is_taken.any():  # the kernel drops it with what makes way
                    expected += [one for one in expectations.exported(connection, scope) if isinstance(one, Batch)]
                self._make_way(connection, scope, batch.take(left[is_taken]))
                left = left[is_taken | is_less]
                made[left] = results(1)
            for one in expected:
                expectations.insert(connection, scope, one)
        if batch.template.is_translated:
            made["reason"][made["reason"] == Reason.EXISTS] = Reason.TRANSLATION_TAKEN
        return made

    def renew(self, scope: Scope, batch: Batch) -> Results:
        if not batch.template.is_flow:
            return results(len(batch), Outcome.ABSENT)
        # The kernel also takes an entry that is this flow turned round; giving it time does no harm. It takes no other
        # timeout where one is fixed, as in all that was inserted of GRE (`encode.requests`): those are PRESENT.
        made = results(len(batch))
        _absent(made, ~_may_be_there(scope, batch))
        _refuse(made, batch.rows["remainingTimeoutSeconds"] == 0, Reason.EXPIRED)  # 0 would remove it
        if batch.template.is_expectation:
            _absent(made, ~expectations.is_known(batch))
            return self._ask_of_expected(expectations.renew, scope, batch, made, {errno.ENOENT: Outcome.ABSENT})
        with self._connections.lend(scope.namespace) as connection:
            self._leave_to_neighbours(connection, scope, batch, made)
            left = np.flatnonzero(came_out(made, Outcome.IMPORTED))
            codes = _ask(connection, Request.RENEW, *_named(scope, batch, left))[0]
            _record(made, left, codes, connection, {errno.ENOENT: Outcome.ABSENT, errno.EPERM: Outcome.PRESENT})
        return made

    def arrived(self, scope: Scope, batch: Batch) -> None:
        """Has windows checked again where the source did, as soon as packets have told what they are."""
        template = batch.template
        if template.is_flow and template.protocol is TCP and not template.is_expectation:
            batch = batch.take(~_is_liberal(batch).all(axis=0) & ~_lacks_a_scale(batch))
            if scope.is_shared:  # the other end's session may have put it in anew
                batch.rows["flowId"] = 0
            self._window_checks.begin(scope, batch)

    def remove(self, scope: Scope, identities: Batch) -> Results:
        if not identities.template.is_flow:
            return results(len(identities), Outcome.ABSENT)
        identities = identities.identities
        made = results(len(identities), Outcome.REMOVED)
        _absent(made, ~_may_be_there(scope, identities))
        if identities.template.is_expectation:
            return self._ask_of_expected(expectations.remove, scope, identities, made, {errno.ENOENT: Outcome.ABSENT})
        with self._connections.lend(scope.namespace) as connection:
            self._leave_to_neighbours(connection, scope, identities, made)
            # Without an id the kernel would also delete an entry that is this flow turned round, so ask for the id.
            nameless = np.flatnonzero((identities.rows["flowId"] == 0) & came_out(made, Outcome.REMOVED))
            if len(nameless):
                identities = identities.copy()
                wanted = identities.take(nameless)
                for found in _of_same_key(wanted, self._look(connection, scope, wanted)[1]):
                    identities.rows["flowId"][nameless[found.numbers]] = found.batch.rows["flowId"]
                _absent(made, (identities.rows["flowId"] == 0) & came_out(made, Outcome.REMOVED))
            left = np.flatnonzero(came_out(made, Outcome.REMOVED))
            codes = _ask(connection, Request.DELETE_WITH_ID, *_named(scope, identities, left))[0]
            _record(made, left, codes, connection, {errno.ENOENT: Outcome.ABSENT})
        return made

    # --- how

    def _checked(self, scope: Scope, batch: Batch) -> Batch:
        """As `WindowChecks` asks for it. What is not there, or under another id, is not asked for again."""
        found, is_there = self.read_back(scope, batch)
        is_there &= (batch.rows["flowId"] == 0) | (batch.rows["flowId"] == found.rows["flowId"])
        # A flow that is offloaded is liberal for good, for the kernel sees none of its packets.
        is_there &= found.rows["conntrackStatus"] & np.uint32(nl.STATUS_OFFLOADED) == 0
        is_left = is_there & (_is_liberal(found) & ~_is_liberal(batch)).any(axis=0)
        is_known = (_flags(found) & np.uint8(nl.FLAG_MAXACK_SET) != 0).all(axis=0)
        ready = np.flatnonzero(is_left & is_known)
        with self._connections.lend(scope.namespace) as connection:
            codes, _ = _ask(connection, Request.CHECK_WINDOWS, *_named(scope, batch, ready))
        is_left[ready] = codes != 0
        return batch.take(is_left)

    def _ask_of_expected(
        self,
        ask: Callable[[Connection, Scope, Batch], npt.NDArray[np.int32]],
        scope: Scope,
        batch: Batch,
        made: Results,
        harmless: dict[int, Outcome] | None = None,
    ) -> Results:
        """Asks for those of which nothing was said yet, and that are of no flow with another local port."""
        with self._connections.lend(scope.namespace) as connection:
            self._leave_to_neighbours(connection, scope, batch, made)
            left = np.flatnonzero(came_out(made, Outcome.IMPORTED) | came_out(made, Outcome.REMOVED))
            _record(made, left, ask(connection, scope, batch.take(left)), connection, harmless)
        return made

    def _decoder(self, scope: Scope, addresses: Addresses | None = None) -> Decoder:
        timeouts = self._connections.timeouts(scope.namespace)
        return Decoder(scope.zones, addresses, timeouts, accounting=self._accounting)

    def _dump(self, scope: Scope, addresses: Addresses | None = None) -> Iterator[Decoded | Omitted]:
        """Everything in the scope's zones, by as few dumps as the kernel makes cheap. May raise Torn."""
        decoder = self._decoder(scope, addresses)
        zones: Sequence[int | None] = sorted(set(scope.zones.values()))
        if 0 in zones or (len(zones) > 1 and not probe.features().filters_dump_by_zone):
            zones = [None]
        with self._connections.lend(scope.namespace) as connection:
            for zone in zones:
                for messages in connection.dump(encode.dump_request(zone)):
                    # Whether or not the kernel filtered, the decoder does.
                    yield from decoder.decode(messages)

    def _find(self, scope: Scope, wanted: Batch) -> Iterator[Decoded]:
        """The entries of the same keys, numbered by the rows of `wanted`; by asking for each or by one dump."""
        if not len(wanted):
            return
        with self._connections.lend(scope.namespace) as connection:
            in_use, _ = _stats(connection)
            if len(wanted) * _GET_PER_DUMPED <= in_use + _DUMP_FIXED:
                yield from _of_same_key(wanted, self._look(connection, scope, wanted)[1])
                return
        index = KeyIndex(wanted)
        for _ in range(_MOST_DUMPS):
            try:
                for part in self._dump(scope):
                    if isinstance(part, Decoded) and part.batch.template.key == wanted.template.key:
                        at = index.find(part.batch)
                        hit = at >= 0
                        if hit.any():
                            yield Decoded(part.batch.take(hit), at[hit])
            except Torn:
                continue
            return
        raise errors.DeviceFailed(f"the conntrack table changed under {_MOST_DUMPS} dumps, so none is complete")

    def _look(self, connection: Connection, scope: Scope, wanted: Batch) -> tuple[Mask, list[Decoded]]:
        """Which of these flows the kernel knows, in either direction, and what it holds, numbered by row."""
        here = np.flatnonzero(_may_be_there(scope, wanted))
        codes, answers = _ask(connection, Request.GET, *_named(scope, wanted, here))
        unexpected = codes[(codes != 0) & (codes != errno.ENOENT)]
        if len(unexpected):
            raise errors.DeviceFailed(f"the kernel answers a look-up with {os.strerror(unexpected[0])}", unexpected[0])
        known = np.zeros(len(wanted), bool)
        known[here] = codes == 0
        found = []
        decoder = self._decoder(scope)
        for messages, numbers in answers:
            for part in decoder.decode(messages):
                if isinstance(part, Decoded):
                    found.append(Decoded(part.batch, here[numbers[part.numbers]]))
        return known, found

    def _leave_to_neighbours(self, connection: Connection, scope: Scope, batch: Batch, made: Results) -> None:
        """Settles the flows of other local ports of a shared zone: PRESENT or ABSENT, and nothing else is done."""
        if not scope.is_shared:
            return
        is_open = came_out(made, Outcome.IMPORTED) | came_out(made, Outcome.REMOVED)
        theirs = np.flatnonzero(has_end_in(batch, _neighbours(scope)) & is_open)
        if not len(theirs):
            return
        if batch.template.is_expectation:
            _, known = expectations.read_back(connection, scope, batch.take(theirs))
        else:
            known, _ = self._look(connection, scope, batch.take(theirs))
        made["outcome"][theirs] = np.where(known, Outcome.PRESENT, Outcome.ABSENT)

    def _make_way(self, connection: Connection, scope: Scope, batch: Batch) -> None:
        """Deletes the entries that hold a tuple of these flows, in either direction, each by its own name and id.

        What comes to a NAT may be another guest's.
        """
        for wanted in (batch, answers(batch)):
            for found in self._look(connection, scope, wanted)[1]:
                victims = found.batch
                if scope.is_shared:
                    victims = victims.take(~has_end_in(victims, _neighbours(scope)))
                if batch.template.is_translated:
                    victims = victims.take(~are_anothers(victims, scope.addresses))
                _ask(connection, Request.DELETE_WITH_ID, victims, _zones(scope, victims))


def _is_carried(template: Template) -> bool:
    if not template.is_flow or template.name not in TEMPLATES:
        return False
    # What few flows have may be left out; what is expected is of TCP or UDP.
    usual = template.usual.name
    return template.is_expectation or usual in TEMPLATES_OF_EVERY_KERNEL or usual in (probe.features().optional or ())


def _with_own_masters(scope: Scope, batch: Batch) -> Batch:
    """A copy in which none has a master that is not the port's: nobody may tie a flow to another guest's."""
    made = batch.copy()
    is_own = np.zeros(len(made), bool)
    for name in made.address_fields:
        if name.startswith("master"):
            is_own |= holds_any(made.rows[name], made.template.is_ipv6, scope.addresses)
    made.rows["masterProtocolIdentifier"][~is_own] = 0
    return made


def _take_less(batch: Batch, which: Numbers, codes: npt.NDArray[np.int32]) -> Mask:
    """Leaves out a helper that this kernel does not have and a master that is not here, for the flow lives without.

    :returns: for which of the rows it did; what is read back tells what they lack.
    """
    did = np.zeros(len(which), bool)
    if batch.template.is_extended:
        extras = encode.extras_of(batch)[which]
        for code, extra, name in (
            (errno.EOPNOTSUPP, Extra.HELPER, "conntrackHelper"),
            (errno.ENOENT, Extra.MASTER, "masterProtocolIdentifier"),
        ):
            is_less = (codes == code) & (extras & int(extra) != 0)
            batch.rows[name][which[is_less]] = 0
            did |= is_less
    return did


def _ask(
    connection: Connection, request: Request, batch: Batch, zones: npt.NDArray[np.uint16]
) -> tuple[npt.NDArray[np.int32], list[tuple[Messages, Offsets]]]:
    """As `Connection.ask`, for any number of rows."""
    if request is not Request.INSERT or not batch.template.is_extended:
        return _ask_alike(connection, request, batch, zones)
    codes, extras = np.zeros(len(batch), np.int32), encode.extras_of(batch)
    for some in np.unique(extras):  # in order: masters first
        alike = np.flatnonzero(extras == some)
        codes[alike], _ = _ask_alike(connection, request, batch.take(alike), zones[alike], int(some))
    return codes, []  # an insert is answered by codes alone


def _ask_alike(
    connection: Connection, request: Request, batch: Batch, zones: npt.NDArray[np.uint16], extras: int = 0
) -> tuple[npt.NDArray[np.int32], list[tuple[Messages, Offsets]]]:
    """Of flows that all have the same of `encode.Extra`."""
    codes = np.zeros(len(batch), np.int32)
    answers: list[tuple[Messages, Offsets]] = []
    octets = len(encode.layout(request, batch.template, True, extras).model)
    step = max(1, min(connection.answers_that_fit, _OCTETS_AT_ONCE // octets))
    for begin in range(0, len(batch), step):
        part = slice(begin, begin + step)
        made = encode.requests(request, Batch(batch.template, batch.rows[part]), zones[part], extras)
        codes[part], entries = connection.ask(made)
        answers += [(messages, numbers + begin) for messages, numbers in entries]
    return codes, answers


def _named(scope: Scope, batch: Batch, which: Numbers) -> tuple[Batch, npt.NDArray[np.uint16]]:
    """These rows, and the zone of each."""
    if len(which) < len(batch):
        batch = batch.take(which)
    return batch, _zones(scope, batch)


def _zones(scope: Scope, batch: Batch) -> npt.NDArray[np.uint16]:
    zones = np.zeros(256, np.uint16)
    for role, zone in scope.zones.items():
        zones[role] = zone
    chosen: npt.NDArray[np.uint16] = zones[batch.rows["zoneRole"]]
    return chosen


def _has_zone(scope: Scope, batch: Batch) -> Mask:
    known = np.zeros(256, bool)
    known[list(scope.zones)] = True
    chosen: Mask = known[batch.rows["zoneRole"]]
    return chosen


def _may_be_there(scope: Scope, batch: Batch) -> Mask:
    """Which flows can be named to the kernel at all."""
    if batch.template.protocol is GRE:
        return _has_zone(scope, batch) & _has_room_for_keys(batch)
    return _has_zone(scope, batch)


def _has_room_for_keys(batch: Batch) -> Mask:
    has_room = np.ones(len(batch), bool)
    for name in batch.template.protocol.identifiers.names:
        has_room &= batch.rows[name] <= nl.MOST_GRE_KEY
    return has_room


def _flags(batch: Batch) -> npt.NDArray[np.uint8]:
    """Of TCP flows, shape (2, n): of each direction."""
    return np.stack([batch.rows["tcpTrackingFlags"], batch.rows["reverseTcpTrackingFlags"]])


def _is_liberal(batch: Batch) -> Mask:
    """Shape (2, n): of each direction."""
    liberal: Mask = _flags(batch) & np.uint8(nl.FLAG_BE_LIBERAL) != 0
    return liberal


def _lacks_a_scale(batch: Batch) -> Mask:
    """Of flows of which one end only had said how it scales its window, as when the other had not answered yet.

    The kernel takes the scales of both or of none. What it learns of the answer leaves it with a wrong one of the other
    end, and with window checks it would drop what that end is sent.
    """
    scaled = _flags(batch) & np.uint8(nl.FLAG_WINDOW_SCALE)
    lacks: Mask = scaled[0] != scaled[1]
    return lacks


def _ask_for_checks(batch: Batch, waiting: Sequence[Waiting]) -> None:
    """Those of the flows that are to have window checks again ask for them, and not for what they are eased by now.

    So it is no matter to the next host whether the guest stayed here for long enough.
    """
    for asked in waiting:
        if batch.template.protocol is TCP and batch.template.key == asked.batch.template.key:
            at = asked.index.find(batch)
            found = np.flatnonzero(at >= 0)
            wanted = asked.batch.take(at[found])
            is_same = (wanted.rows["flowId"] == 0) | (wanted.rows["flowId"] == batch.rows["flowId"][found])
            for name in ("tcpTrackingFlags", "reverseTcpTrackingFlags"):
                batch.rows[name][found[is_same]] &= wanted.rows[name][is_same] | np.uint8(~nl.FLAG_BE_LIBERAL & 0xFF)


def _is_barred(scope: Scope, batch: Batch) -> Mask:
    barred: Mask = batch.rows["flowMark"] & np.uint32(scope.barred_marks) != 0
    return barred


def _without(part: Decoded, which: Mask) -> Decoded:
    return Decoded(part.batch.take(~which), part.numbers[~which]) if which.any() else part


def _omitted(barred: Batch) -> Omitted:
    return Omitted(BARRED, len(barred), names(barred, 5))


def _neighbours(scope: Scope) -> Addresses:
    return tuple(address for address in scope.neighbours if address not in scope.addresses)


def _refuse(made: Results, which: Mask, reason: Reason) -> None:
    """The first reason stays."""
    which = which & ~came_out(made, Outcome.REFUSED)
    made["outcome"][which], made["reason"][which] = Outcome.REFUSED, reason


def _absent(made: Results, which: Mask) -> None:
    made["outcome"][which] = Outcome.ABSENT


def _record(
    made: Results,
    numbers: Numbers,
    codes: npt.NDArray[np.int32],
    connection: Connection,
    harmless: dict[int, Outcome] | None = None,
) -> None:
    """Notes what the kernel answered to the rows of these numbers."""
    for code in np.unique(codes[codes != 0]):
        which = numbers[codes == code]
        if harmless and int(code) in harmless:
            made["outcome"][which] = harmless[int(code)]
            continue
        reason = _REASONS.get(int(code), Reason.DEVICE_ERROR)
        if reason is Reason.OUT_OF_MEMORY:
            in_use, capacity = _stats(connection)
            if capacity is not None and in_use >= capacity:
                reason = Reason.TABLE_FULL
        made["outcome"][which], made["reason"][which] = Outcome.REFUSED, reason


def _of_same_key(wanted: Batch, found: list[Decoded]) -> list[Decoded]:
    """Without the entries that are a wanted flow turned round, or reach it by a translation."""
    same = []
    for part in found:
        is_same = (key_words(part.batch) == key_words(wanted.take(part.numbers))).all(axis=1)
        if is_same.all():
            same.append(part)
        elif is_same.any():
            same.append(Decoded(part.batch.take(is_same), part.numbers[is_same]))
    return same


def _in_order(template: Template, count: int, found: list[Decoded]) -> Rows:
    """Rows of `template` at the numbers they were found for, zeros elsewhere."""
    # Gathered: numpy scatters more slowly.
    pool, at = [template.empty(1).view(template.whole)], np.zeros(count, np.intp)
    others, used = [], 1
    for part in found:
        if part.batch.template != template:
            others.append(part)
            continue
        pool.append(part.batch.rows.view(template.whole))
        at[part.numbers] = np.arange(used, used + len(part.batch))
        used += len(part.batch)
    rows: Rows = np.concatenate(pool).take(at).view(template.dtype)
    for part in others:  # the same key, translated: what both templates have
        for name in template.dtype.names or ():
            if name in (part.batch.rows.dtype.names or ()):
                rows[name][part.numbers] = part.batch.rows[name]
    return rows


def _merge(omitted: dict[str, Omitted], part: Omitted, examples: int = 5) -> None:
    known = omitted.get(part.reason)
    if known is not None:
        part = Omitted(part.reason, known.count + part.count, (known.examples + part.examples)[:examples])
    omitted[part.reason] = part


def _stats(connection: Connection) -> tuple[int, int | None]:
    """Entries in the namespace, and how many there may be (None: an old kernel does not say)."""
    codes, answers = connection.ask(encode.stats_request()[None, :])
    if codes[0]:
        raise failure(int(codes[0]), "question how full its conntrack table is")
    if not answers:
        raise errors.DeviceFailed("the kernel does not tell how full its conntrack table is")
    messages = answers[0][0]
    raw = messages.octets[messages.starts[0] : messages.starts[0] + messages.lengths[0]].tobytes()
    told = {kind: int.from_bytes(value, "big") for kind, value in attributes_of(raw[_BODY:]).items()}
    return told.get(nl.STATS_GLOBAL_ENTRIES, 0), told.get(nl.STATS_GLOBAL_MAX_ENTRIES)


def _device(namespace: str | None) -> str:
    # One running kernel has one boot id, in whatever container it is read.
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    device, inode = identity_of(namespace)
    return f"linux-conntrack:{boot}:{device}:{inode}"


def _notes(found: probe.Features, switches: Mapping[str, int | None], receive_octets: int) -> Iterator[str]:
    if found.why_unknown:
        yield f"the kernel's abilities could not be tried: {found.why_unknown}"
    if found.keeps_zones is False:
        yield "the kernel has no conntrack zones; it needs CONFIG_NF_CONNTRACK_ZONES"
    if found.optional is not None:
        for protocol, option in nl.OPTIONAL.items():
            if not {f"{protocol.kind}-{family}" for family in protocol.families} <= found.optional:
                yield f"the kernel does not track {protocol.label}, so such flows are left behind; it needs {option}"
        if not any(TEMPLATES[name].is_translated for name in found.optional):
            yield "the kernel makes no NAT, so translated flows are left behind; it needs CONFIG_NF_NAT"
    if MARKS not in found.functions:
        yield "the kernel keeps no conntrack marks; it needs CONFIG_NF_CONNTRACK_MARK"
    if HELPERS not in found.functions:
        yield "the kernel has no helper for FTP; flows with one lose it; it needs the module nf_conntrack_ftp"
    if found.filters_dump_by_zone is False:
        yield "the kernel dumps all zones when asked for one, so exports take longer; kernels from 6.8 on do better"
    if switches[_EVENTS] == 0:
        yield "conntrack events are off; set net.netfilter.nf_conntrack_events to 2 or 1"
    yield from (words for name, words in _NOT_CARRIED.items() if switches[name])
    if receive_octets < 4 << 20:
        yield "the socket's receive buffer is small; raise net.core.rmem_max to 8 MiB or more"
