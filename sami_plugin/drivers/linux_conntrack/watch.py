"""Which flows changed, from conntrack's events.

An event only says that something happened to a flow. What the flow is now is asked for when the changes are collected:
UPDATE events tell only what changed, and a flow that changed ten times has to travel once.

With net.netfilter.nf_conntrack_events=2, the default of newer kernels, an entry tells events only if somebody listened
in its namespace when it was made. So the agent holds `keep_events_on` for as long as it runs, and a session exports
again from time to time for the sake of older entries.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

import numpy as np

from sami_plugin.drivers.base import Changes, Watch
from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.drivers.linux_conntrack.decode import Decoded, Decoder
from sami_plugin.drivers.linux_conntrack.expectations import ExpectationEvents
from sami_plugin.drivers.linux_conntrack.netlink import Connection
from sami_plugin.model.flows import Batch, FirewallEvent, Rows, Template
from sami_plugin.model.keys import KeyIndex, last_of_each_key

_GROUPS = nl.GROUP_NEW, nl.GROUP_UPDATE, nl.GROUP_DESTROY

Look = Callable[[Batch], Iterable[Decoded]]
"""Asks the kernel for these flows: what it holds of them, numbered by the rows of the argument."""


class ConntrackWatch(Watch):
    """The changes of some zones of one namespace. Made by `LinuxConntrackDriver.watch`."""

    def __init__(
        self, connection: Connection, zones: Iterable[int], decoder: Decoder, look: Look, expected: ExpectationEvents
    ) -> None:
        """Takes `connection` and `expected` over. Changes are noted from now on."""
        self._connection = connection
        self._expected = expected
        self._decoder = decoder
        self._look = look
        # The filter first: no event of another zone may be waiting when the first one is wanted.
        connection.attach_filter(zone_filter(zones))
        connection.join(*_GROUPS)

    def collect(self) -> Changes:
        chunks, is_complete = self._connection.events()
        touched: dict[Template, list[Rows]] = {}
        for messages in chunks:
            for part in self._decoder.decode(messages):
                if isinstance(part, Decoded):
                    # Flows of all templates of a protocol have one key, so they are looked up as one kind.
                    names = part.batch.identities
                    touched.setdefault(names.template.plain, []).append(names.rows)
        removals: list[Batch] = []
        upserts: list[Batch] = []
        for template, rows in touched.items():
            self._settle(Batch.joined(template, rows), removals, upserts)
        gone, there, told_all = self._expected.collect()  # later: what is expected needs its master
        return Changes((*removals, *gone), (*upserts, *there), is_complete and told_all)

    def close(self) -> None:
        self._connection.close()
        self._expected.close()

    def _settle(self, touched: Batch, removals: list[Batch], upserts: list[Batch]) -> None:
        """Finds out what became of these flows. One key may be named several times and with several ids."""
        keys = touched.take(last_of_each_key(touched))
        present = np.zeros(len(keys), bool)
        ids = np.zeros(len(keys), touched.rows["flowId"].dtype)
        for found in self._look(keys):
            # The kernel also answers with an entry that is this one turned round; that one has events of its own.
            upserts.append(found.batch)
            present[found.numbers] = True
            ids[found.numbers] = found.batch.rows["flowId"]
        # What was there under another id, or is not there at all.
        names = touched.take(np.unique(touched.rows, return_index=True)[1])
        at = KeyIndex(keys).find(names)
        gone = names.take(~present[at] | (ids[at] != names.rows["flowId"]))
        if len(gone):
            gone.rows["firewallEvent"] = FirewallEvent.DELETED
            removals.append(gone)


class EventsKeptOn:
    """Listens to a namespace's conntrack events and takes none of them; what it is for is told above."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        connection.attach_filter(_program((_RETURN, 0, 0, 0)))
        connection.join(*_GROUPS)

    def close(self) -> None:
        """May be repeated."""
        self._connection.close()

    def __enter__(self) -> EventsKeptOn:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def keep_events_on(namespace: str | None) -> EventsKeptOn:
    """Makes the kernel give every entry made from now on in this namespace the ability to tell events.

    Costs no CPU time of the caller: the kernel drops each event at the socket's filter. Close it to end it.

    :raises NotAvailable, NotPermitted: there is no way into the namespace.
    """
    return EventsKeptOn(Connection(namespace, 1 << 16))


_LOAD_NUMBER, _LOAD_WORD, _LOAD_HALF_AT_X, _LOAD_X, _TO_X = 0x00, 0x20, 0x48, 0x01, 0x07
_IF_EQUAL, _RETURN = 0x15, 0x06
_ALL = 0xFFFFFFFF
# SKF_AD_OFF + SKF_AD_NLATTR: the offset of the attribute of type X among those that begin at A; 0 if there is none.
_FIND_ATTRIBUTE = (-0x1000 + 12) & 0xFFFFFFFF
_FIRST_ATTRIBUTE = 20


def zone_filter(zones: Iterable[int]) -> bytes:
    """A classic BPF program that lets through the events of these zones.

    The kernel runs it where the event is made, so what it drops costs the watching process nothing.
    """
    wanted = sorted(set(zones))
    program = [
        (_LOAD_NUMBER, 0, 0, _FIRST_ATTRIBUTE),
        (_LOAD_X, 0, 0, nl.ZONE),
        (_LOAD_WORD, 0, 0, _FIND_ATTRIBUTE),
        # No such attribute: the entry is in zone 0, and 0 is what is loaded.
        (_IF_EQUAL, 2, 0, 0),
        (_TO_X, 0, 0, 0),
        (_LOAD_HALF_AT_X, 0, 0, 4),
    ]
    program += [(_IF_EQUAL, len(wanted) - number, 0, zone) for number, zone in enumerate(wanted)]
    program += [(_RETURN, 0, 0, 0), (_RETURN, 0, 0, _ALL)]
    return _program(*program)


def _program(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
