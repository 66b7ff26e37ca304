"""The outside as the guests' router: DHCP, and the way to Nova's metadata service.

It stands for Neutron's DHCP and metadata agents. Nova knows a guest by the address that it asks from.
"""

from __future__ import annotations

import contextlib
from types import TracebackType

from lab.openstack import addresses
from lab.openstack.api import wait_for
from lab.openstack.dhcp import DhcpServer
from lab.openstack.lab import OpenStackLab
from lab.openstack.parts import PYTHON, SCRIPTS
from lab.openstack.service import Service
from lab.openstack.settings import CONTROLLER, PORTS

SERVICE = "nova-metadata"
METADATA = "169.254.169.254"
START_SECONDS = 180.0
WAY = f"""table ip metadata {{
  chain to {{ type nat hook prerouting priority dstnat; policy accept;
    ip daddr {METADATA} tcp dport 80 dnat to {CONTROLLER}:{PORTS[SERVICE]}
  }}
  chain through {{ type filter hook forward priority filter; policy drop;
    ct status dnat accept
  }}
}}
"""


class Router:
    """A context manager: within it a guest of a lab that asks for its address and for metadata is answered.

    Who is outside reaches the APIs from then on.
    """

    def __init__(self, lab: OpenStackLab) -> None:
        self._lab = lab
        files = [f"/etc/nova/{name}.conf" for name in ("nova", SERVICE)]
        words = [word for file in files for word in ("--config-file", file)]
        self._metadata = Service(lab.controller, SERVICE, [PYTHON, SCRIPTS / "nova-api", *words])

    def __enter__(self) -> Router:
        """Blocks until Nova's service answers."""
        with contextlib.ExitStack() as stack:
            self._metadata.start()
            stack.callback(self._metadata.stop)
            self._lab.lead_outside_to_controller()
            self._lab.outside.sysctl("net.ipv4.ip_forward", 1)
            self._lab.outside.run(["nft", "-f", "-"], WAY)
            for number in addresses.NETWORKS.values():
                stack.enter_context(DhcpServer(self._lab.outside, self._lab.cloud, number))
            wait_for(self._answers, "Nova's metadata service to answer", START_SECONDS)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _answers(self) -> bool:
        self._metadata.check()
        return self._lab.cloud.answers(SERVICE)
