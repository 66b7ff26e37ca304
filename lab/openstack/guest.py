"""A server of Nova: the small Linux of `lab.libvirt` with one port, which admits the control port and nothing else."""

from __future__ import annotations

import socket
from typing import Any

from lab.errors import LabError
from lab.namespace import Namespace
from lab.openstack import addresses, content
from lab.openstack.api import Cloud, Refused, wait_for
from lab.openstack.content import CONTROL_PORT

WITH_HOST = "2.74"
ACTIVE_SECONDS = 180.0
BOOT_SECONDS = 120.0
GONE_SECONDS = 90.0
TELL_SECONDS = 20.0


class Guest:
    """One guest, made by the constructor; `wait_until_ready` is next."""

    def __init__(self, cloud: Cloud, outside: Namespace, name: str, number: int, network: str, host: str) -> None:
        """`number` counts the lab's guests from 0."""
        self.name = name
        self.network = network
        self.address = addresses.address(addresses.NETWORKS[network], addresses.FIRST_GUEST_HOST + number)
        self._cloud = cloud
        self._outside = outside
        port = content.make_port(cloud, name, network, addresses.FIRST_GUEST_HOST + number)
        self.port: str = port["id"]
        self.tap = content.tap(port)
        image = cloud.find("image", "/images", "images", content.IMAGE)["id"]
        server = {
            "name": name,
            "imageRef": image,
            "flavorRef": content.FLAVOR,
            "host": host,
            "networks": [{"port": self.port}],
        }
        self.uuid: str = cloud.post("compute", "/servers", {"server": server}, WITH_HOST)["server"]["id"]
        self.domain = ""

    def wait_until_ready(self) -> None:
        """Blocks until its control port answers; `domain` is libvirt's name of it then. Raises LabError."""

        def is_active() -> bool:
            server = self.server()
            if server["status"] == "ERROR":
                raise LabError(f"Nova could not make {self.name}: {server.get('fault', {}).get('message')}")
            return server["status"] == "ACTIVE"

        wait_for(is_active, f"{self.name} to be ACTIVE", ACTIVE_SECONDS)
        self.domain = self.server()["OS-EXT-SRV-ATTR:instance_name"]
        wait_for(self._answers, f"{self.name} to boot", BOOT_SECONDS)

    def server(self) -> Any:
        """What Nova says of it."""
        return self._cloud.get("compute", f"/servers/{self.uuid}")["server"]

    @property
    def host(self) -> str:
        """Where it is, as Nova says."""
        name: str = self.server()["OS-EXT-SRV-ATTR:host"]
        return name

    def tell(self, line: str) -> str:
        """Its shell runs the line as root; what that says. Raises LabError where it does not answer.

        Whatever is left running in the background must have let go of stdout and stderr.
        """
        try:
            with self._outside.inside():
                control = socket.create_connection((self.address, CONTROL_PORT), TELL_SECONDS)
            with control:
                control.sendall(f"{line}\nexit\n".encode())
                heard = b""
                while octets := control.recv(65536):
                    heard += octets
        except ConnectionResetError:  # the shell ended before it had read all
            pass
        except OSError as error:
            raise LabError(f"guest {self.name} did not take the line {line!r}: {error}") from error
        return heard.decode(errors="replace")

    def delete(self) -> None:
        """Blocks until Nova and Neutron know it no more. May be repeated."""
        for service, path in (("compute", f"/servers/{self.uuid}"), ("network", f"/ports/{self.port}")):
            try:
                self._cloud.call(service, "DELETE", path)
            except Refused as error:
                if error.status != 404:
                    raise
            wait_for(
                lambda service=service, path=path: self._is_gone(service, path),  # type: ignore[misc]
                f"{self.name} to be gone",
                GONE_SECONDS,
            )

    def _is_gone(self, service: str, path: str) -> bool:
        try:
            self._cloud.get(service, path)
        except Refused as error:
            if error.status == 404:
                return True
            raise
        return False

    def _answers(self) -> bool:
        try:
            return "ready" in self.tell("echo ready")
        except LabError:
            return False
