"""What a host's firewall says of its devices, whatever program wrote the rules down.

A rule counts only as far as it is understood whole, and only where packets get to it: a rule that asks for more than is
read here, say for a protocol, says nothing of a device's zone.
"""

from __future__ import annotations

import enum
import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import netaddr

from sami_plugin.model.flows import Addresses

Devices = frozenset[str] | None
"""Names of devices; None is any device, those that are not there included."""

ANY_DEVICE = "*"
"""Among the users of a zone: packets of whatever device."""

BOTH = frozenset((4, 6))
"""Versions of IP."""

BROADCAST = ipaddress.IPv4Address("255.255.255.255")


class Verdict(enum.Enum):
    """What becomes of a packet."""

    GOES_ON = "goes on"
    """It is accepted, or goes on where its chain was called."""
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Assignment:
    """Packets that came in by `devices`, and go to `destinations` unless that is None, have their flows in `zone`."""

    zone: int
    devices: Devices = None
    destinations: Addresses | None = None
    is_conditional: bool = False
    """So have some of them only."""


@dataclass(frozen=True, slots=True)
class Jump:
    """Packets that came in by `devices` go on in `chain`."""

    chain: str
    devices: Devices = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a chain. `devices` and the addresses are what it asks of a packet, and None where it does not ask."""

    chain: str
    devices: Devices = None
    sources: Addresses | None = None
    is_of_other_sources: bool = False
    """It is about packets from all but `sources`."""
    destinations: Addresses | None = None
    is_conditional: bool = False
    """It asks for more than that."""
    versions: frozenset[int] = BOTH
    """Of the packets that get to it."""
    verdict: Verdict | None = None
    jumps: tuple[Jump, ...] = ()
    assignments: tuple[Assignment, ...] = ()


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What this host knows of its devices by itself."""

    zones: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """By device, the zones that all its packets get. Rules that disagree give several."""
    users: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """By zone, the devices of which some packets get it, whatever else they have to be."""
    versions: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """By device, of which IP versions its packets get a zone; of a device that is not named, of both."""
    destinations: Mapping[int, Addresses] = field(default_factory=dict)
    """By zone, the addresses to which packets get it."""
    own: Mapping[str, Addresses] = field(default_factory=dict)
    """By device, the addresses that it may send from, or that are reached by it."""
    present: frozenset[str] = frozenset()
    """The devices that are there."""
    ports: Mapping[str, str] = field(default_factory=dict)
    """By device, the name that the network's agent has for its port, where it has one."""

    @classmethod
    def of(
        cls,
        rules: Iterable[Rule],
        begins: Iterable[str],
        present: Iterable[str],
        routed: Mapping[str, Addresses] | None = None,
    ) -> Knowledge:
        """`begins` are the chains where packets that are received begin; `routed` are addresses by device."""
        by_chain = defaultdict[str, list[Rule]](list)
        for rule in rules:
            by_chain[rule.chain].append(rule)
        zones, users = defaultdict[str, set[int]](set), defaultdict[int, set[str]](set)
        versions = defaultdict[str, set[int]](set)
        destinations, own = (
            defaultdict[int, list[netaddr.IPAddress]](list),
            defaultdict[str, list[netaddr.IPAddress]](list),
        )
        for device, addresses in (routed or {}).items():
            own[device] += addresses
        for chain, reached in _reach(by_chain, begins).items():
            for rule in by_chain.get(chain, ()):
                devices = _both(reached, rule.devices)
                own_device = _owner(rule, devices)
                if own_device is not None:
                    own[own_device] += rule.sources or ()
                for one in rule.assignments:
                    got_by = _both(devices, one.devices)
                    going_to = rule.destinations if one.destinations is None else one.destinations
                    is_conditional = rule.is_conditional or one.is_conditional
                    if going_to is not None:
                        destinations[one.zone] += going_to if not is_conditional else ()
                        continue
                    users[one.zone] |= {ANY_DEVICE} if got_by is None else got_by
                    if got_by is not None and not is_conditional and not rule.is_of_other_sources:
                        for device in got_by:
                            zones[device].add(one.zone)
                            versions[device] |= rule.versions & _versions_of(rule.sources)
        return cls(
            zones={device: frozenset(some) for device, some in zones.items()},
            versions={device: frozenset(some) for device, some in versions.items() if some},
            users={zone: frozenset(some) for zone, some in users.items()},
            destinations={zone: tuple(dict.fromkeys(some)) for zone, some in destinations.items()},
            own={device: tuple(dict.fromkeys(some)) for device, some in own.items()},
            present=frozenset(present),
        )


def _reach(by_chain: Mapping[str, Sequence[Rule]], begins: Iterable[str]) -> dict[str, Devices]:
    """By chain that packets get to, the devices that they can have come in by."""
    reached: dict[str, Devices] = dict.fromkeys(begins)
    to_follow = dict.fromkeys(reached)  # in order, each once
    while to_follow:
        chain = next(iter(to_follow))
        del to_follow[chain]
        for rule in by_chain.get(chain, ()):
            for jump in rule.jumps:
                devices = _both(_both(reached[chain], rule.devices), jump.devices)
                if jump.chain not in reached:
                    reached[jump.chain] = devices
                else:
                    before = reached[jump.chain]
                    if before is None or (devices is not None and devices <= before):
                        continue
                    reached[jump.chain] = None if devices is None else before | devices
                to_follow[jump.chain] = None
    return reached


def _versions_of(addresses: Addresses | None) -> frozenset[int]:
    return BOTH if addresses is None else frozenset(address.version for address in addresses)


def _both(one: Devices, other: Devices) -> Devices:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _owner(rule: Rule, devices: Devices) -> str | None:
    """The device that may send from the rule's sources, if it is a rule against spoofing."""
    if rule.sources is None or rule.destinations is not None or rule.is_conditional:
        return None
    if devices is None or len(devices) != 1:
        return None
    lets_pass = rule.verdict is Verdict.GOES_ON or bool(rule.assignments)
    is_about = rule.verdict is Verdict.DROP if rule.is_of_other_sources else lets_pass
    return next(iter(devices)) if is_about else None


def host_address(text: str) -> netaddr.IPAddress | None:
    """The address of one host, written plain or as a network of one; None for everything else."""
    plain, slash, length = text.partition("/")
    try:
        address = ipaddress.ip_address(plain)
    except ValueError:
        return None
    if slash and length != str(address.max_prefixlen):
        return None
    is_no_host = address.is_unspecified or address.is_multicast or address.is_loopback or address == BROADCAST
    return None if is_no_host or "%" in plain else netaddr.IPAddress(plain)
