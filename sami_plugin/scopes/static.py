"""Scopes from a file that the operator, or what sets the ports up, keeps; doc/source/user/scopes.rst has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import netaddr

from sami_plugin.errors import ConfigurationError
from sami_plugin.model.flows import Addresses, ZoneRole
from sami_plugin.model.scope import DEFAULT_ZONE, Scope
from sami_plugin.scopes.base import ScopeFinder

if TYPE_CHECKING:
    from oslo_config import cfg


ROLES = {role.name.lower(): role for role in ZoneRole}


class StaticScopes(ScopeFinder):
    """Reads the file `scope_file`."""

    def __init__(self, scope_file: str | Path) -> None:
        self._file = Path(scope_file)

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        """Takes `[agent] scope_file`."""
        return cls(conf.agent.scope_file)

    def find(self, guest: str) -> tuple[Scope, ...]:
        return tuple(self._scope(port) for port in self._read() if port["guest"] == guest)

    def _read(self) -> list[dict[str, Any]]:
        try:
            ports = json.loads(self._file.read_text())["ports"]
            return [self._checked(port) for port in ports]
        except KeyError as error:
            raise ConfigurationError(f"scope_file {self._file}: {error} is missing") from error
        except (OSError, ValueError, TypeError, netaddr.AddrFormatError) as error:
            raise ConfigurationError(f"scope_file {self._file}: {type(error).__name__}: {error}") from error

    @staticmethod
    def _checked(port: dict[str, Any]) -> dict[str, Any]:
        zone = port["zone"]
        if type(zone) is not int or not 0 <= zone <= 0xFFFF:
            raise ValueError(f"zone {zone!r} of port {port['port']!r} is no number from 0 to 65535")
        addresses, translations = port["addresses"], port.get("translations", [])
        for name, known in (("addresses", addresses), ("translations", translations)):
            if not isinstance(known, list) or not all(isinstance(address, str) for address in known):
                raise ValueError(f"{name} of port {port['port']!r} are no list of texts")
        role = port.get("role", "port")
        if role not in ROLES:
            raise ValueError(f"role {role!r} of port {port['port']!r} is none of {', '.join(ROLES)}")
        namespace = port.get("namespace")
        if namespace is not None and not (isinstance(namespace, str) and namespace):
            raise ValueError(f"namespace {namespace!r} of port {port['port']!r} is no path")
        is_everybodys = namespace is None and zone == DEFAULT_ZONE
        is_shared = port.get("shared", is_everybodys)
        if not isinstance(is_shared, bool):
            raise ValueError(f"shared {is_shared!r} of port {port['port']!r} is neither true nor false")
        if is_everybodys and not is_shared:
            raise ValueError(
                f"port {port['port']!r} cannot have zone {DEFAULT_ZONE} for itself, the host's connections are in it; "
                'write "shared": true, or give the port another zone'
            )
        return {
            "port": str(port["port"]),
            "guest": str(port["guest"]),
            "namespace": namespace,
            "zone": zone,
            "role": ROLES[role],
            "shared": is_shared,
            "addresses": _addresses(addresses),
            "translations": _addresses(translations),
        }

    def neighbours(self, scope: Scope) -> Addresses:
        place = (scope.namespace, next(iter(scope.zones.values())))
        return tuple(
            address
            for port in self._read()
            if (port["namespace"], port["zone"]) == place and port["port"] != scope.port
            for address in port["addresses"]
        )

    def namespaces(self) -> tuple[str | None, ...]:
        return tuple({port["namespace"]: None for port in self._read()})

    @staticmethod
    def _scope(port: dict[str, Any]) -> Scope:
        return Scope(
            port=port["port"],
            guest=port["guest"],
            zones={port["role"]: port["zone"]},
            addresses=port["addresses"],
            namespace=port["namespace"],
            is_shared=port["shared"],
            translations=port["translations"],
        )


def _addresses(texts: list[str]) -> Addresses:
    # Strictly: netaddr before 1.0 takes 192.0.2 for 192.0.0.2.
    return tuple(netaddr.IPAddress(text, flags=netaddr.INET_PTON) for text in texts)
