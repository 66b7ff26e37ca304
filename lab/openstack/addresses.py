"""The address plan. A guest's addresses follow from its number, and its hardware addresses say them (sources/init)."""

CONTROLLER = "controller"
COMPUTES = ("a", "b")

UNDERLAY = {CONTROLLER: "10.93.0.10", "a": "10.93.0.11", "b": "10.93.0.12"}
"""Where services, libvirtd and QEMU are, by machine."""
OUTSIDE_UNDERLAY = "10.93.0.254"
"""The outside's address there, once it has a way to the controller."""

NETWORKS = {"net1": 1, "net2": 2}
"""The guests' networks, by name; the number stands in addresses and in the names of what carries them."""

PREFIX = "10.94"
ALL_NETWORKS = f"{PREFIX}.0.0/16"
OUTSIDE_HOST = 254
FIRST_GUEST_HOST = 11
FIRST_ANCHOR_HOST = 240


def cidr(network: int) -> str:
    """The guests' network of that number."""
    return f"{PREFIX}.{network}.0/24"


def outside(network: int) -> str:
    """The outside's address there."""
    return address(network, OUTSIDE_HOST)


def address(network: int, host: int) -> str:
    """Of a port."""
    return f"{PREFIX}.{network}.{host}"


def mac(network: int, host: int) -> str:
    """Of the port with that address."""
    return f"fa:16:3e:00:{network:02x}:{host:02x}"


def provider(network: int) -> str:
    """What carries the network: Neutron's name of the physical network, and of a host's link to it."""
    return f"phys{network}"
