"""The lab's address plan. Guests are numbered from 0, hosts too."""

OUTSIDE_V4 = "10.92.0.254"
OUTSIDE_V6 = "fd92::fe"
OUTSIDE_MAC = "02:92:00:00:00:fe"

# The two ends of every point-to-point link of a routed lab, and the gateway a routed guest sees.
NEAR_V4, FAR_V4 = "169.254.2.1", "169.254.2.2"
NEAR_V6, FAR_V6 = "fe80::1", "fe80::2"
GATEWAY_V4, GATEWAY_V6 = "169.254.1.1", "fe80::1"
# The same on every host, so a guest that moves keeps its neighbour.
GATEWAY_MAC = "ee:ee:ee:ee:ee:ee"


def guest_addresses(number: int) -> tuple[str, str]:
    """The IPv4 and IPv6 address of a guest."""
    return f"10.92.0.{11 + number}", f"fd92::{11 + number:x}"


def public_addresses(number: int) -> tuple[str, str]:
    """What the outside knows a guest by whose hosts translate its own addresses."""
    return f"203.0.113.{11 + number}", f"fd93::{11 + number:x}"


def guest_mac(number: int) -> str:
    """The guest's hardware address."""
    return f"02:92:00:00:00:{11 + number:02x}"


def uplink_mac(host_number: int) -> str:
    """Of a host's end of its cable."""
    return f"02:92:00:00:01:{host_number:02x}"


def cable_mac(host_number: int) -> str:
    """Of the fabric's end of that cable."""
    return f"02:92:00:00:02:{host_number:02x}"


CABLE_OUT_MAC = "02:92:00:00:02:fe"
