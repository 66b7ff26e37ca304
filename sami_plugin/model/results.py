"""What became of each flow that a driver was given."""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

from sami_plugin.model.flows import COUNTERS, Batch, FlowStatus, Rows


class Outcome(enum.IntEnum):
    """What became of one flow. The first three mean that it is in the device now."""

    IMPORTED = 0
    DEGRADED = 1
    """Imported, but the device keeps less than was asked; `lost` says which fields."""
    PRESENT = 2
    """It was there already and is not ours to replace: the other end is a local port's."""
    REFUSED = 3
    """Not in the device; `reason` says why."""
    REMOVED = 4
    ABSENT = 5
    """A removal found nothing to remove, which is as good."""


class Reason(enum.IntEnum):
    """Why a flow was refused. Each has its own words in the report."""

    NONE = 0
    EXISTS = 1
    NO_ENTRY = 2
    NOT_SUPPORTED = 3
    OUT_OF_MEMORY = 4
    CHAIN_TOO_LONG = 5
    BUSY = 6
    INVALID = 7
    TABLE_FULL = 8
    NOT_PERMITTED = 9
    DEVICE_ERROR = 10
    FOREIGN_ADDRESS = 11
    LOCAL_PORTS_OWN = 12
    NOT_DECLARED = 13
    VANISHED = 14
    EXPIRED = 15
    NOT_ADMITTED = 16
    AMBIGUOUS_ADDRESS = 17
    PEER_CANNOT_FOLLOW = 18
    FOREIGN_TRANSLATION = 19
    NO_PLACE = 20
    BARRED = 21
    TRANSLATION_TAKEN = 22
    NO_ZONE = 23
    SET_FULL = 24
    NOT_AUTHORIZED = 25
    DEVICE_FULL = 26
    NO_TIMEOUTS = 27


MEND_NO_PLACE = "raise nf_conntrack_max or capacity, or lower headroom_percent"
WORDS: dict[Reason, str] = {
    Reason.NONE: "",
    Reason.EXISTS: "another entry of the same tuple is there and could not be replaced (EEXIST)",
    Reason.NO_ENTRY: "the entry it depends on is not there (ENOENT)",
    Reason.NOT_SUPPORTED: "the kernel does not support a part of it, such as its helper (ENOTSUP)",
    Reason.OUT_OF_MEMORY: "the kernel has no memory for it (ENOMEM)",
    Reason.CHAIN_TOO_LONG: "its hash chain is full; raise nf_conntrack_buckets (ENOSPC)",
    Reason.BUSY: "the kernel does not take its status bits (EBUSY)",
    Reason.INVALID: "the kernel finds it invalid (EINVAL)",
    Reason.TABLE_FULL: "the conntrack table is full; raise nf_conntrack_max",
    Reason.NOT_PERMITTED: "the agent may not change this firewall; it needs CAP_NET_ADMIN (EPERM)",
    Reason.DEVICE_ERROR: "the device answered with an error that has no word of its own",
    Reason.FOREIGN_ADDRESS: "neither end is an address of the port",
    Reason.LOCAL_PORTS_OWN: "its other end is a local port of this host, which has no such flow",
    Reason.NOT_DECLARED: "the driver of this host does not carry this kind of flow",
    Reason.VANISHED: "the device took it, but it was not there when it was read back",
    Reason.EXPIRED: "its own timeout ran out before it could be imported",
    Reason.NOT_ADMITTED: "this kind of flow may not come in from the source's domain (kinds_in)",
    Reason.AMBIGUOUS_ADDRESS: "an address in it, as the source's domain calls it, is of a prefix that is ours "
    "(address_map)",
    Reason.PEER_CANNOT_FOLLOW: "its peer would see another address than before, and nothing in between translates it; "
    "if something does, set peers_follow",
    Reason.FOREIGN_TRANSLATION: "it is translated from or to an address that is not the port's",
    Reason.BARRED: "the firewall's mark on it says that its packets are dropped",
    Reason.TRANSLATION_TAKEN: "what it is translated to is another flow's on this host, or is not to be had there "
    "(EEXIST)",
    Reason.NO_ZONE: "what tracks it on this host, such as the guest's router, is not here",
    Reason.SET_FULL: "its set is full; raise the set's size (ENFILE)",
    Reason.NOT_AUTHORIZED: "the device's own rules do not allow it (PCP's NOT_AUTHORIZED)",
    Reason.NO_TIMEOUTS: "it has an end, and its set here has none for its elements; make the set with timeouts",
    Reason.DEVICE_FULL: "the device has no room for it, or gives the guest no more (PCP's NO_RESOURCES, USER_EX_QUOTA)",
    Reason.NO_PLACE: f"there was no free place for it; {MEND_NO_PLACE}",
}

RESULT = np.dtype([("outcome", "u1"), ("reason", "u1"), ("lost", "u8")])
"""One result per record, in the order of the batch; bit i of `lost` stands for field i of `template.state`."""

Results = npt.NDArray[np.void]


def results(count: int, outcome: Outcome = Outcome.IMPORTED, reason: Reason = Reason.NONE) -> Results:
    """`count` equal results."""
    made: Results = np.zeros(count, RESULT)
    made["outcome"], made["reason"] = outcome, reason
    return made


def came_out(made: Results, outcome: Outcome) -> npt.NDArray[np.bool_]:
    """Which flows have this outcome."""
    came: npt.NDArray[np.bool_] = made["outcome"] == int(outcome)  # numpy is slow with members of an enum
    return came


def is_in_device(made: Results) -> npt.NDArray[np.bool_]:
    """Which flows the device holds now."""
    return made["outcome"] <= int(Outcome.PRESENT)


NOT_COMPARED = frozenset({"flowId", "remainingTimeoutSeconds"})
"""Fields that differ by nature: each device gives its own ids, and timeouts run."""

_STATUS = (
    FlowStatus.EXPECTED
    | FlowStatus.SEEN_REPLY
    | FlowStatus.ASSURED
    | FlowStatus.SRC_NAT
    | FlowStatus.DST_NAT
    | FlowStatus.SEQ_ADJUST
    | FlowStatus.FIXED_TIMEOUT
)
COMPARED_BITS: dict[str, int] = {
    # Of the other bits, the device's own bookkeeping sets some as it likes.
    "conntrackStatus": int(_STATUS),
    # 0x20 and 0x40 (a highest acknowledgement is known, a challenge ACK was seen) speak of sequence numbers, which no
    # device can be given.
    "tcpTrackingFlags": 0x9F,
    "reverseTcpTrackingFlags": 0x9F,
}
"""Fields of bits: those that were sent have to be there, others may be there too."""


def lost_fields(sent: Batch, kept: Rows) -> npt.NDArray[np.uint64]:
    """Per flow, which state fields of `kept`, of the same template and order, differ from `sent`: bit i for field i."""
    return _differing(sent, kept, NOT_COMPARED)


def lacks_bits(sent: Batch, kept: Rows) -> npt.NDArray[np.bool_]:
    """Per flow, whether a bit that was sent is not there: no flow loses one, so `kept` is another one's."""
    lacks = np.zeros(len(sent), bool)
    for name in COMPARED_BITS.keys() & set(kept.dtype.names or ()):
        lacks |= (sent.rows[name] & ~kept[name] & COMPARED_BITS[name]) != 0
    return lacks


def has_changed(now: Batch, before: Rows) -> npt.NDArray[np.bool_]:
    """Per flow, whether a state field differs from what it was, or the id. That packets were counted is no change."""
    changed: npt.NDArray[np.bool_] = now.rows["flowId"] != before["flowId"]
    changed |= _differing(now, before, NOT_COMPARED | COUNTERS) != 0
    return changed


def _differing(sent: Batch, kept: Rows, but: frozenset[str]) -> npt.NDArray[np.uint64]:
    lost = np.zeros(len(sent), np.uint64)
    for position, field in enumerate(sent.template.state):
        name = field[0]
        if name in but or name in sent.template.varies:
            continue
        wanted, found = sent.rows[name], kept[name]
        if name in COMPARED_BITS:
            differs = (wanted & ~found & COMPARED_BITS[name]) != 0
        elif name in COUNTERS:
            differs = found < wanted
        else:
            differs = wanted != found
            if differs.ndim > 1:
                differs = differs.any(axis=1)
        lost |= differs * np.uint64(1 << position)
    return lost
