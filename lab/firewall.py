"""What a host's firewall is to the lab, whatever it is made of."""

import threading
from abc import ABC, abstractmethod

from lab.namespace import Namespace
from lab.port import Port

FIRST_ZONE = 4097
# Hosts number their zones differently on purpose: who copies a zone number from one to another is found out.
ZONES_PER_HOST = 1104

UPLINK = "uplink"


class Firewall(ABC):
    """A stateful default-drop firewall between the ports of one host and its uplink.

    It knows ports by the name of their tap, so a port may be programmed before its tap is there and after it went.
    One change is one transaction in the kernel; conntrack entries are never touched. Threads may share it.
    """

    def __init__(self, namespace: Namespace, host_number: int, is_zone_shared: bool) -> None:
        self._namespace = namespace
        self._first_zone = FIRST_ZONE + ZONES_PER_HOST * host_number
        self.is_zone_shared = is_zone_shared
        self._ports: dict[str, Port] = {}
        self._lock = threading.Lock()

    def zone(self, port: Port) -> int:
        """The conntrack zone of this port on this host."""
        return self._first_zone if self.is_zone_shared else self._first_zone + port.number

    def program(self, *ports: Port) -> None:
        """Let these ports' rules be as given, new or changed. Returns when the kernel has them."""
        with self._lock:
            self._ports |= {port.id: port for port in ports}
            self._apply(list(self._ports.values()))

    def withdraw(self, port: Port) -> None:
        """Forget a port: it has no zone any more and nothing of it passes. May be repeated."""
        with self._lock:
            self._ports.pop(port.id, None)
            self._apply(list(self._ports.values()))

    @abstractmethod
    def set_up(self) -> None:
        """Drop everything. Call once, first."""

    @abstractmethod
    def _apply(self, ports: list[Port]) -> None:
        """Replace the kernel's rules by those for `ports`, atomically in each family."""
