"""Numbers of nfnetlink and ctnetlink, with what the kernel does about them.

From include/uapi/linux/netfilter/{nfnetlink,nfnetlink_conntrack,nf_conntrack_tcp}.h; what the notes say was seen in
net/netfilter/nf_conntrack_netlink.c. Integers in attributes are big-endian, those in headers are in host order.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import numpy as np

from sami_plugin.model import protocols
from sami_plugin.model.flows import FlowStatus
from sami_plugin.model.protocols import SctpState, TcpState

# --- netlink
NETLINK_NETFILTER = 12
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLM_F_REQUEST = 0x01
NLM_F_ACK = 0x04
NLM_F_DUMP_INTR = 0x10  # shares its bit with no request flag
NLM_F_DUMP = 0x300
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_CAP_ACK = 10  # errors without a copy of the message they are about
NETLINK_EXT_ACK = 11
SO_ATTACH_FILTER = 26
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
NLA_TYPE_MASK = 0x3FFF  # the two upper bits: nested, network byte order

# --- the subsystem; its number is the upper octet of the message type
CTNETLINK = 1
CT_NEW = CTNETLINK << 8 | 0
CT_GET = CTNETLINK << 8 | 1
CT_DELETE = CTNETLINK << 8 | 2  # without any tuple this is a flush: never send it so
CT_GET_STATS = CTNETLINK << 8 | 5
GROUP_NEW, GROUP_UPDATE, GROUP_DESTROY = 1, 2, 3

# --- the subsystem of what helpers expect
EXPECTATIONS = 2
EXP_NEW = EXPECTATIONS << 8 | 0  # creates, with the helper's own timeout; of one that is there sets timeout and flags
EXP_GET = EXPECTATIONS << 8 | 1  # never dump those of one master: no end is told where that has no helper
EXP_DELETE = EXPECTATIONS << 8 | 2  # without a tuple and a helper this is a flush: never send it so
EXPECTATION_GROUPS = 4, 5, 6

# --- attributes of an entry
TUPLE_ORIG = 1
TUPLE_REPLY = 2
STATUS = 3  # on create CONFIRMED is needed; EXPECTED or DYING give EBUSY; others are set, ignored, never cleared
PROTOINFO = 4  # of DESTROY events only the TCP state, in UPDATE events when changed, not for offloaded entries
HELP = 5  # taken at create only; EOPNOTSUPP where the kernel has no such helper
TIMEOUT = 7  # seconds; EINVAL without at create; not dumped for offloaded entries
# Taken at create only, beside a reply that is not translated; where one of the two is there, without the other the
# kernel translates nothing on that side. EEXIST: what answers are sent to is another entry's.
NAT_SRC = 6
# Told where nf_conntrack_acct is on, of events only by DESTROY; never taken.
COUNTERS_ORIG, COUNTERS_REPLY = 9, 10
MARK = 8  # dumped only when not 0
# On delete compared: another id gives ENOENT. A hash over the entry's place in memory and its tuple: unique while the
# entry lives, but an entry made again at once often gets the same place and the same id.
ID = 12
NAT_DST = 13
# At create. ENOENT unless the master is in the same zone; sets EXPECTED. Dumped for as long as the entry lives, also
# without its master.
TUPLE_MASTER = 14
SEQ_ADJUST_ORIG, SEQ_ADJUST_REPLY = 15, 16
ZONE = 18  # dumped only when not 0. In a dump request a filter since 6.8, where 0 means any; ignored before
TIMESTAMP = 20  # where nf_conntrack_timestamp is on, and else as the counters
# Taken where something in the namespace sets labels (nft's "ct label set", xt_connlabel, act_ct, Open vSwitch; on newer
# kernels also where nft looks at them), ignored anywhere else. An entry that can have some tells them, also none.
LABELS = 22
SYNPROXY = 24  # every entry that ctnetlink made tells one, of zeros
# --- inside a tuple
TUPLE_IP = 1
TUPLE_PROTO = 2
TUPLE_ZONE = 3  # an entry whose zone counts in this direction only; such entries have no ZONE
IP_V4_SRC, IP_V4_DST, IP_V6_SRC, IP_V6_DST = 1, 2, 3, 4
PROTO_NUM = 1
PROTO_SRC_PORT, PROTO_DST_PORT = 2, 3
PROTO_ICMP_ID, PROTO_ICMP_TYPE, PROTO_ICMP_CODE = 4, 5, 6
PROTO_ICMPV6_ID, PROTO_ICMPV6_TYPE, PROTO_ICMPV6_CODE = 7, 8, 9
# --- inside a NAT. Each is a range, of one value where its upper end is missing
NAT_V4_MIN, NAT_PROTO, NAT_V6_MIN = 1, 3, 4
NAT_PROTO_MIN = 1  # of a port, or of an ICMP identifier
# --- inside protoinfo
PROTOINFO_TCP = 1
PROTOINFO_SCTP = 3
TCP_STATE = 1
TCP_WSCALE_ORIGINAL, TCP_WSCALE_REPLY = 2, 3  # taken only if both directions' flags hold WINDOW_SCALE
TCP_FLAGS_ORIGINAL, TCP_FLAGS_REPLY = 4, 5  # one octet of flags, one of mask: which flags to set or clear
# All three are needed at create (EINVAL). The tags are those that packets of the direction carry; without the right one
# DATA and SACK are INVALID.
SCTP_STATE = 1
SCTP_TAG_ORIGINAL, SCTP_TAG_REPLY = 2, 3
# --- inside help: the name, with a zero behind it
HELP_NAME = 1
HELPER_OCTETS = 16
# --- inside a sequence adjustment. All three are needed
SEQ_ADJUST_POSITION, SEQ_ADJUST_BEFORE, SEQ_ADJUST_AFTER = 1, 2, 3
# --- inside synproxy
SYNPROXY_SEQUENCE, SYNPROXY_TIMESTAMP, SYNPROXY_OFFSET = 1, 2, 3
# --- attributes of an expectation
EXPECT_MASTER, EXPECT_TUPLE, EXPECT_MASK = 1, 2, 3
EXPECT_TIMEOUT = 4
EXPECT_ID = 5
# Told is the master's. What is sent becomes that of the flow that comes, and says whose classes the class is of.
EXPECT_HELPER = 6
EXPECT_ZONE = 7  # never told
EXPECT_FLAGS, EXPECT_CLASS, EXPECT_NAT, EXPECT_FUNCTION = 8, 9, 10, 11
EXPECT_NAT_DIRECTION, EXPECT_NAT_TUPLE = 1, 2
# --- inside counters and a timestamp: 64 bits each, and the latter in nanoseconds
COUNTERS_PACKETS, COUNTERS_OCTETS = 1, 2
TIMESTAMP_START = 1
# --- of GET_STATS
STATS_GLOBAL_ENTRIES, STATS_GLOBAL_MAX_ENTRIES = 1, 2


@dataclass(frozen=True, slots=True)
class Part:
    """An attribute inside a tuple that tells flows apart which have the same two addresses."""

    number: int
    name: str
    """Of the column."""
    form: str
    field: str
    """Of a row."""


IDENTIFIERS: dict[protocols.Identifiers, tuple[Part, ...]] = {
    protocols.PORTS: (
        Part(PROTO_SRC_PORT, "source_port", ">u2", "sourceTransportPort"),
        Part(PROTO_DST_PORT, "destination_port", ">u2", "destinationTransportPort"),
    ),
    # The source's "port" is the key that packets of the reply carry. Of 32 bits the kernel has 16, and 0 where packets
    # are not PPTP's (GRE of version 0).
    protocols.GRE_KEYS: (
        Part(PROTO_SRC_PORT, "source_port", ">u2", "reverseGreKey"),
        Part(PROTO_DST_PORT, "destination_port", ">u2", "greKey"),
    ),
    protocols.ICMP.identifiers: (
        Part(PROTO_ICMP_ID, "icmp_id", ">u2", "icmpIdentifier"),
        Part(PROTO_ICMP_TYPE, "icmp_type", "u1", "icmpTypeIPv4"),
        Part(PROTO_ICMP_CODE, "icmp_code", "u1", "icmpCodeIPv4"),
    ),
    protocols.ICMPV6.identifiers: (
        Part(PROTO_ICMPV6_ID, "icmp_id", ">u2", "icmpIdentifier"),
        Part(PROTO_ICMPV6_TYPE, "icmp_type", "u1", "icmpTypeIPv6"),
        Part(PROTO_ICMPV6_CODE, "icmp_code", "u1", "icmpCodeIPv6"),
    ),
}
"""What `protocols.Identifiers` are in a tuple, in the order in which they are sent."""
MOST_GRE_KEY = 0xFFFF

ADJUSTMENT = ("tcpCorrectionPosition", "tcpOffsetBefore", "tcpOffsetAfter")
"""Fields of a row, in the order of SEQ_ADJUST_POSITION and what follows it."""
REPLYS_ADJUSTMENT = ("reverseTcpCorrectionPosition", "reverseTcpOffsetBefore", "reverseTcpOffsetAfter")
OF_SYNPROXY = ("synproxySequenceNumber", "synproxyTimestamp", "synproxyTimestampOffset")
"""In the order of SYNPROXY_SEQUENCE and what follows it."""

OPTIONAL: dict[protocols.Protocol, str] = {
    protocols.SCTP: "CONFIG_NF_CT_PROTO_SCTP",
    protocols.UDPLITE: "CONFIG_NF_CT_PROTO_UDPLITE",
    protocols.GRE: "CONFIG_NF_CT_PROTO_GRE",
}
"""Protocols that a kernel may be built without, or have no more. It tracks them by their addresses alone then, takes
inserts with ports, forgets the ports, and says nothing."""

FLAG_WINDOW_SCALE = 0x01
FLAG_BE_LIBERAL = 0x08
FLAG_MAXACK_SET = 0x20
FLAG_CHALLENGE_ACK = 0x40
FLAGS_CARRIED = 0xFF & ~(FLAG_MAXACK_SET | FLAG_CHALLENGE_ACK)
"""The other two speak of sequence numbers, which ctnetlink neither tells nor takes."""

STATUS_TAKEN = FlowStatus.SEEN_REPLY | FlowStatus.ASSURED | FlowStatus.CONFIRMED | FlowStatus.FIXED_TIMEOUT
"""Status bits that an insert may hold. Others are ignored by the kernel or refused with EBUSY."""
STATUS_OFFLOADED = FlowStatus.OFFLOAD | FlowStatus.HW_OFFLOAD

AF_OF_FAMILY = {"ipv4": int(socket.AF_INET), "ipv6": int(socket.AF_INET6)}

# enum tcp_conntrack in kernel order. Conntrack sits in the middle: it sees one FIN_WAIT where an end tells two apart.
_KERNEL_STATES = (
    TcpState.NONE,
    TcpState.SYN_SENT,
    TcpState.SYN_RECEIVED,
    TcpState.ESTABLISHED,
    TcpState.FIN_WAIT_1,
    TcpState.CLOSE_WAIT,
    TcpState.LAST_ACK,
    TcpState.TIME_WAIT,
    TcpState.CLOSED,
    TcpState.SYN_SENT_SIMULTANEOUS,
)
NO_STATE = 0xFF

STATE_FROM_KERNEL = np.zeros(256, np.uint8)
"""Kernel's number of a TCP state to `TcpState`; 0 where there is none."""
STATE_FROM_KERNEL[: len(_KERNEL_STATES)] = _KERNEL_STATES

STATE_TO_KERNEL = np.full(256, NO_STATE, np.uint8)
"""`TcpState` to the kernel's number; NO_STATE where it has none."""
STATE_TO_KERNEL[list(_KERNEL_STATES)] = range(len(_KERNEL_STATES))
# What another device may tell and conntrack does not tell apart: the nearest by the segments that were seen.
# FIN_WAIT_2: one FIN, acknowledged. CLOSING: both FINs.
STATE_TO_KERNEL[TcpState.FIN_WAIT_2] = STATE_TO_KERNEL[TcpState.CLOSE_WAIT]
STATE_TO_KERNEL[TcpState.CLOSING] = STATE_TO_KERNEL[TcpState.LAST_ACK]

# enum sctp_conntrack in kernel order. The ninth, HEARTBEAT_ACKED, was another path in use; since 6.3, and in updates of
# kernels before, the kernel calls that ESTABLISHED.
_KERNEL_SCTP_STATES = (
    SctpState.NONE,
    SctpState.CLOSED,
    SctpState.COOKIE_WAIT,
    SctpState.COOKIE_ECHOED,
    SctpState.ESTABLISHED,
    SctpState.SHUTDOWN_SENT,
    SctpState.SHUTDOWN_RECEIVED,
    SctpState.SHUTDOWN_ACK_SENT,
    SctpState.HEARTBEAT_SENT,
)
SCTP_HEARTBEAT_ACKED = 9

SCTP_STATE_FROM_KERNEL = np.zeros(256, np.uint8)
"""As STATE_FROM_KERNEL, for `SctpState`."""
SCTP_STATE_FROM_KERNEL[: len(_KERNEL_SCTP_STATES)] = _KERNEL_SCTP_STATES
SCTP_STATE_FROM_KERNEL[SCTP_HEARTBEAT_ACKED] = SctpState.ESTABLISHED

SCTP_STATE_TO_KERNEL = np.full(256, NO_STATE, np.uint8)
SCTP_STATE_TO_KERNEL[list(_KERNEL_SCTP_STATES)] = range(len(_KERNEL_SCTP_STATES))
# Of an end that has data to send before it ends the association; no chunk says so.
SCTP_STATE_TO_KERNEL[SctpState.SHUTDOWN_PENDING] = SCTP_STATE_TO_KERNEL[SctpState.ESTABLISHED]

STATES_TO_KERNEL = {"tcpConnectionState": STATE_TO_KERNEL, "sctpAssociationState": SCTP_STATE_TO_KERNEL}
"""By field of a row."""
