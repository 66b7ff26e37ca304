"""Scopes of a bridging host: br_netfilter, iptables, a zone for what comes in by a tap.

    *raw
    -A neutron-linuxbri-PREROUTING -m physdev --physdev-in tap1234abcd-5e -j CT --zone 4097
    *filter
    -A neutron-linuxbri-s1234abcd-5 -s 192.0.2.7/32 -m mac --mac-source fa:16:3e:00:00:07 -j RETURN

Neutron's rules are read as those of anybody else; see doc/source/user/scopes.rst for what counts. iptables prints the
same text whether it works by nf_tables or the older way.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator

from sami_plugin.scopes.command import output_of
from sami_plugin.scopes.learned import LearnedScopes
from sami_plugin.scopes.rules import Assignment, Jump, Knowledge, Rule, Verdict, host_address

LOG = logging.getLogger(__name__)

PACKAGE = "iptables"
TOOLS = ("iptables-save", "ip6tables-save")
OLDER_TABLES = "tables-legacy tables present"
"""Part of a remark that iptables-nft-save makes where the older tables have rules too."""

_COMMENT = re.compile(r' -m comment --comment (?:"(?:[^"\\]|\\.)*"|[^\s"]+)')
_ZONE = re.compile(r"0|[1-9][0-9]{0,4}")
_VERDICTS = {
    "ACCEPT": Verdict.GOES_ON,
    "RETURN": Verdict.GOES_ON,
    "DROP": Verdict.DROP,
    "REJECT": Verdict.DROP,
}
_BARE_VERDICTS = tuple(f" -j {target}" for target in _VERDICTS)
_HARMLESS = ("--physdev-is-bridged", "--physdev-is-in", "--mac-source")
"""What may be asked beside device and addresses and is so of every packet of the port that counts."""


class BridgeIptablesScopes(LearnedScopes):
    """Asks iptables-save and ip6tables-save, once each for all guests."""

    _has_warned = False

    def _look(self) -> Knowledge:
        rules: list[Rule] = []
        for tool in TOOLS:
            text, remark = output_of([tool], PACKAGE)
            if OLDER_TABLES in remark and not self._has_warned:
                self._has_warned = True
                LOG.warning("%s: there are rules of iptables-legacy too, and they are not read; use one of both", tool)
            rules += rules_of(text, tool)
        # The names that the calling thread's namespace has; /sys may show another's.
        return Knowledge.of(rules, begins_of(TOOLS), (name for _, name in socket.if_nameindex()))


def begins_of(tools: tuple[str, ...]) -> list[str]:
    """The chains where the packets of a bridge's ports begin, as `rules_of` names them."""
    return [
        _chain(tool, table, chain)
        for tool in tools
        for table, chain in (
            ("raw", "PREROUTING"),
            ("mangle", "PREROUTING"),
            ("mangle", "FORWARD"),
            ("filter", "FORWARD"),
        )
    ]


def rules_of(text: str, tool: str) -> Iterator[Rule]:
    """The rules of what iptables-save wrote; what is none is skipped."""
    table = ""
    for line in text.split("\n"):  # a comment may hold what else ends a line
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith("-A ") and (" -j " in line or " -g " in line):
            # Most rules are like that, and tell of no address, zone or chain.
            if line.endswith(_BARE_VERDICTS) and " -s " not in line:
                continue
            yield _rule(_COMMENT.sub("", line).split(), tool, table)


def _chain(tool: str, table: str, chain: str) -> str:
    return f"{tool} {table} {chain}"


def _rule(words: list[str], tool: str, table: str) -> Rule:
    """`words` are `-A CHAIN`, what is asked, `-j TARGET` or `-g CHAIN`, and the target's options."""
    physical = interface = None
    sources = destinations = None
    is_of_other_sources = is_conditional = is_negated = False
    position = 2
    while position < len(words) and words[position] not in ("-j", "-g"):
        option, value = words[position], words[position + 1] if position + 1 < len(words) else ""
        position += 1
        if option == "!":
            is_negated = True
            continue
        if option in ("-s", "-d") and (address := host_address(value)) is not None:
            position += 1
            if option == "-d":
                destinations = (address,)
                is_conditional |= is_negated
            else:
                sources, is_of_other_sources = (address,), is_negated
        elif option in ("--physdev-in", "-i") and value and not is_negated and not value.endswith("+"):
            position += 1
            if option == "-i":
                interface = value
            else:
                physical = value
        elif option == "-m":
            position += 1  # what the extension asks comes as options of its own
        elif option in _HARMLESS and not is_negated:
            position += option == "--mac-source"
        else:
            is_conditional = True
        is_negated = False
    target = words[position + 1] if position + 1 < len(words) else ""
    # A bridged packet has both: what the bridge's own name is asked of is asked of all its ports.
    device = physical or interface
    zone = _zone(words[position + 2 :]) if target == "CT" and table == "raw" else None
    verdict = _VERDICTS.get(target)
    return Rule(
        chain=_chain(tool, table, words[1]),
        devices=None if device is None else frozenset((device,)),
        sources=sources,
        is_of_other_sources=is_of_other_sources,
        destinations=destinations,
        is_conditional=is_conditional,
        versions=frozenset((6 if tool.startswith("ip6") else 4,)),
        verdict=verdict,
        jumps=(Jump(_chain(tool, table, target)),) if verdict is None and zone is None else (),
        assignments=(Assignment(zone),) if zone is not None else (),
    )


def _zone(options: list[str]) -> int | None:
    """Of one direction only, or by mark, is not what is meant."""
    if options[:1] != ["--zone"] or not _ZONE.fullmatch("".join(options[1:2])):
        return None
    zone = int(options[1])
    return zone if zone <= 0xFFFF else None
