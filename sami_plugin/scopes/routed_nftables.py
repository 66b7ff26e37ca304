"""Scopes of a routing host: nftables, a zone for what comes in by a tap, host routes to the tap.

    table inet firewall {
        chain zones {
            type filter hook prerouting priority raw
            iifname "tap-web" ct zone set 4097
            ip daddr 192.0.2.7 ct zone set 4097
        }
    }

and `192.0.2.7 dev tap-web scope link`. See doc/source/user/scopes.rst for what counts.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import netaddr

from sami_plugin.errors import NotAvailable
from sami_plugin.model.flows import Addresses
from sami_plugin.scopes.command import output_of
from sami_plugin.scopes.learned import LearnedScopes
from sami_plugin.scopes.rules import BOTH, Assignment, Devices, Jump, Knowledge, Rule, Verdict, host_address

PACKAGE = "nftables"
TOOL = ("nft", "-j", "-t", "list", "ruleset")
"""Without the elements of named sets, of which there may be very many: what a rule needs is asked for by name."""
FAMILIES = ("inet", "ip", "ip6")
VERSIONS = {"ip": frozenset((4,)), "ip6": frozenset((6,))}

# The calling thread's: /proc/net is that of the process's first thread.
ROUTES = (Path("/proc/thread-self/net/route"), Path("/proc/thread-self/net/ipv6_route"))
# include/uapi/linux/{,ipv6_}route.h; behind a gateway are other hosts' guests
_RTF_UP, _RTF_GATEWAY, _RTF_REJECT, _RTF_ANYCAST, _RTF_LOCAL = 0x1, 0x2, 0x200, 0x100000, 0x80000000

_NAME = re.compile(r"[A-Za-z][\w./\\-]*", re.ASCII)
"""As nft's own language has them, of which its arguments are a text."""

_REMARKS = ("counter", "log", "comment")
"""Statements that change nothing of what becomes of a packet."""


class RoutedNftablesScopes(LearnedScopes):
    """Asks `nft`, once for all guests, and the kernel's main routing tables."""

    def _look(self) -> Knowledge:
        text, _ = output_of(TOOL, PACKAGE)
        rules, begins = rules_of(ruleset_of(text), elements_of)
        try:
            texts = [path.read_text() if path.exists() else "" for path in ROUTES]
        except OSError as error:
            raise NotAvailable(f"the routes of this host cannot be read: {error}; /proc has to be there") from error
        return Knowledge.of(rules, begins, (name for _, name in socket.if_nameindex()), routes_of(*texts))


def routes_of(ipv4: str, ipv6: str) -> Mapping[str, Addresses]:
    """By device, the hosts that are routed to it, from the text of /proc/net/route and of /proc/net/ipv6_route."""
    found = defaultdict[str, list[netaddr.IPAddress]](list)
    for line in ipv4.splitlines()[1:]:
        words = line.split()
        # device, destination, gateway, flags, 3 counters, mask; addresses are numbers of this machine's byte order
        if len(words) >= 8 and words[7] == "FFFFFFFF" and _is_used(words[3]) and _is_hex(words[1], 8):
            octets = int(words[1], 16).to_bytes(4, sys.byteorder)
            _note(found[words[0]], str(ipaddress.IPv4Address(octets)))
    for line in ipv6.splitlines():
        words = line.split()
        # destination, length, source, length, next hop, metric, 2 counters, flags, device
        if len(words) >= 10 and words[1] == "80" and _is_used(words[8]) and _is_hex(words[0], 32):
            _note(found[words[9]], str(ipaddress.IPv6Address(int(words[0], 16))))
    return {device: tuple(addresses) for device, addresses in found.items()}


def _note(addresses: list[netaddr.IPAddress], text: str) -> None:
    address = host_address(text)
    if address is not None:
        addresses.append(address)


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and all(letter in "0123456789abcdefABCDEF" for letter in text)


def _is_used(flags: str) -> bool:
    if not _is_hex(flags, len(flags)) or not flags:
        return False
    return int(flags, 16) & (_RTF_UP | _RTF_GATEWAY | _RTF_REJECT | _RTF_ANYCAST | _RTF_LOCAL) == _RTF_UP


def ruleset_of(text: str, tool: Sequence[str] = TOOL) -> list[Any]:
    """The objects of nft's JSON, see libnftables-json(5).

    :raises NotAvailable: it is none; this nft is not one that is known here.
    """
    try:
        ruleset = json.loads(text)["nftables"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise NotAvailable(f"{' '.join(tool)} wrote no JSON as of nftables 0.9 or later: {error}") from error
    if not isinstance(ruleset, list):
        raise NotAvailable(f"{' '.join(tool)} wrote no list of objects; nftables 0.9 or later is needed")
    return ruleset


def elements_of(kind: str, table: str, name: str) -> list[Any]:
    """What is in a named `set` or `map` of a table, which is said with its family.

    :raises NotAvailable, NotPermitted: as `output_of`, and `ruleset_of`.
    """
    tool = ("nft", "-j", "list", kind, *table.split(" ", 1), name)
    text, _ = output_of(tool, PACKAGE)
    return [one for _, thing in _objects(ruleset_of(text, tool)) for one in _elements_in(thing) or ()]


def rules_of(ruleset: list[Any], ask: Callable[[str, str, str], list[Any]]) -> tuple[list[Rule], list[str]]:
    """The rules, and the chains where received packets begin; what is not known here is skipped.

    `ask` is `elements_of`, for a set whose elements are not in the ruleset.
    """
    rules, begins = [], []
    sets = _Sets(ruleset, ask)
    for kind, thing in _objects(ruleset):
        if kind == "chain" and thing.get("hook") in ("prerouting", "forward"):
            begins.append(_chain(thing, thing.get("name")))
        elif kind == "rule" and isinstance(thing.get("expr"), list) and _may_say_something(thing["expr"]):
            rules.append(_Reader(thing, sets).rule())
    return rules, begins


def _may_say_something(expr: list[Any]) -> bool:
    """Whether a rule can give a zone, lead on, or say which addresses a device may have.

    Else it is not read, nor the sets that it asks for: a list of addresses that are dropped can be long.
    """
    said = [statement for statement in expr if isinstance(statement, dict)]
    is_of_others = any(isinstance(one.get("match"), dict) and one["match"].get("op") == "!=" for one in said)
    return is_of_others or any(not _SAYS.isdisjoint(one) for one in said)


_SAYS = frozenset(("mangle", "jump", "goto", "vmap", "accept", "return"))


class _Sets:
    """The elements of named sets, each asked for once, where a rule needs it."""

    def __init__(self, ruleset: list[Any], ask: Callable[[str, str, str], list[Any]]) -> None:
        self._ask = ask
        self._kinds: dict[tuple[str, str], str] = {}
        self._elements: dict[tuple[str, str], list[Any]] = {}
        for kind, thing in _objects(ruleset):
            if kind in ("set", "map"):
                place = _table(thing), str(thing.get("name"))
                self._kinds[place] = kind
                if (elements := _elements_in(thing)) is not None:
                    self._elements[place] = elements

    def get(self, table: str, name: str) -> list[Any] | None:
        """None where there is no such set."""
        place = table, name
        is_known = place in self._elements or place not in self._kinds
        if not is_known and all(map(_NAME.fullmatch, (*table.split(" ", 1), name))):
            self._elements[place] = self._ask(self._kinds[place], table, name)
        return self._elements.get(place)


def _elements_in(thing: dict[str, Any]) -> list[Any] | None:
    elements = thing.get("elem")
    return elements if isinstance(elements, list) else None


def _objects(ruleset: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in ruleset:
        if isinstance(entry, dict):
            for kind, thing in entry.items():
                if isinstance(thing, dict) and thing.get("family") in FAMILIES:
                    yield kind, thing


def _table(thing: dict[str, Any]) -> str:
    return f"{thing.get('family')} {thing.get('table')}"


def _chain(thing: dict[str, Any], name: object) -> str:
    return f"{_table(thing)} {name}"


class _Reader:
    """Reads one rule, statement by statement."""

    def __init__(self, thing: dict[str, Any], sets: _Sets) -> None:
        self._thing = thing
        self._sets = sets
        self._devices: Devices = None
        self._sources: Addresses | None = None
        self._is_of_other_sources = False
        self._destinations: Addresses | None = None
        self._is_conditional = False
        self._verdict: Verdict | None = None
        self._jumps: list[Jump] = []
        self._assignments: list[Assignment] = []

    def rule(self) -> Rule:
        for statement in self._thing["expr"]:
            if isinstance(statement, dict) and len(statement) == 1:
                ((kind, said),) = statement.items()
                self._take(kind, said)
            else:
                self._is_conditional = True
        return Rule(
            chain=_chain(self._thing, self._thing.get("chain")),
            devices=self._devices,
            sources=self._sources,
            is_of_other_sources=self._is_of_other_sources,
            destinations=self._destinations,
            is_conditional=self._is_conditional,
            versions=VERSIONS.get(self._thing["family"], BOTH),
            verdict=self._verdict,
            jumps=tuple(self._jumps),
            assignments=tuple(self._assignments),
        )

    def _take(self, kind: str, said: Any) -> None:
        match kind:
            case "match" if isinstance(said, dict):
                self._is_conditional |= not self._asks(said)
            case "mangle" if isinstance(said, dict):
                if said.get("key") == {"ct": {"key": "zone"}}:
                    self._assign(said.get("value"))
            case "accept" | "return":
                self._verdict = Verdict.GOES_ON
            case "drop" | "reject":
                self._verdict = Verdict.DROP
            case "jump" | "goto" if isinstance(said, dict):
                self._jumps.append(Jump(_chain(self._thing, said.get("target"))))
            case "vmap" if isinstance(said, dict):
                self._follow(said)
            case _ if kind in _REMARKS:
                pass
            case _:
                self._is_conditional = True

    def _asks(self, said: dict[str, Any]) -> bool:
        """Whether all that is asked is understood."""
        left, is_equal = said.get("left"), said.get("op") == "=="
        wanted = self._elements(said.get("right"))
        if wanted is None or not (is_equal or said.get("op") == "!="):
            return False
        if _is_device(left):
            names = frozenset(name for name in wanted if _is_name(name))
            if not is_equal or len(names) != len(wanted) or self._devices is not None:
                return False
            self._devices = names
            return True
        end = _end(left)
        addresses = _addresses(wanted)
        if end == "saddr" and addresses is not None and self._sources is None:
            self._sources, self._is_of_other_sources = addresses, not is_equal
            return True
        if end == "daddr" and addresses is not None and is_equal and self._destinations is None:
            self._destinations = addresses
            return True
        return False

    def _assign(self, value: Any) -> None:
        if _is_zone(value):
            self._assignments.append(Assignment(value))
            return
        looked_up = value.get("map") if isinstance(value, dict) else None
        if not isinstance(looked_up, dict):
            return
        for key, zone in self._pairs(looked_up.get("data")):
            if not _is_zone(zone):
                continue
            if _is_device(looked_up.get("key")):
                self._assignments.append(Assignment(zone, frozenset((key,)) if _is_name(key) else None))
            elif _end(looked_up.get("key")) == "daddr":
                # To a network, or a range: the zone is no port's own, and not that of all packets that get here.
                hosts = _addresses([key])
                self._assignments.append(Assignment(zone, destinations=hosts, is_conditional=hosts is None))
            else:
                self._assignments.append(Assignment(zone))  # some packets of any device
                self._is_conditional = True

    def _follow(self, said: dict[str, Any]) -> None:
        """A verdict map. Its verdicts other than jumps are of single elements, so the rule has none of its own."""
        is_by_device = _is_device(said.get("key"))
        for key, verdict in self._pairs(said.get("data")):
            for kind in ("jump", "goto"):
                if isinstance(verdict, dict) and isinstance(verdict.get(kind), dict):
                    devices = frozenset((key,)) if is_by_device and _is_name(key) else None
                    self._jumps.append(Jump(_chain(self._thing, verdict[kind].get("target")), devices))
        self._is_conditional = True

    def _elements(self, value: Any) -> list[Any] | None:
        """Of a value, an anonymous set or a named one."""
        if isinstance(value, str) and value.startswith("@"):
            value = self._sets.get(_table(self._thing), value[1:])
        elif isinstance(value, dict) and isinstance(value.get("set"), list):
            value = value["set"]
        if isinstance(value, (str, dict)):
            value = [value]
        return [_plain(one) for one in value] if isinstance(value, list) else None

    def _pairs(self, data: Any) -> Iterator[tuple[Any, Any]]:
        for pair in self._elements(data) or ():
            if isinstance(pair, list) and len(pair) == 2:
                yield _plain(pair[0]), pair[1]


def _plain(element: Any) -> Any:
    """An element of a set without its counter, timeout or comment."""
    if isinstance(element, dict) and isinstance(element.get("elem"), dict):
        return element["elem"].get("val")
    return element


def _is_device(left: Any) -> bool:
    return left in ({"meta": {"key": "iifname"}}, {"meta": {"key": "iif"}})


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and not value.endswith("*")


def _is_zone(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 0xFFFF


def _end(left: Any) -> str | None:
    payload = left.get("payload") if isinstance(left, dict) else None
    if not isinstance(payload, dict) or payload.get("protocol") not in ("ip", "ip6"):
        return None
    return payload.get("field") if payload.get("field") in ("saddr", "daddr") else None


def _addresses(values: list[Any]) -> Addresses | None:
    """None when one of them is no address of one host."""
    found = [host_address(value) if isinstance(value, str) else None for value in values]
    return None if None in found else tuple(found)
