"""What tests of sets of the kernel's share, whichever sort of set it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import pytest

from lab.namespace import Namespace
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.drivers.nft_sets.kinds import IPV4, IPV6, NO_OTHER
from sami_plugin.model.flows import Batch, Template, ZoneRole
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import NEIGHBOUR_ADDRESSES, PORT_ADDRESSES, FlowDriverConformance, flows


def scope_of(place: Namespace) -> Scope:
    return Scope("port", "guest", {ZoneRole.PORT: 7}, PORT_ADDRESSES, place.path)


def told(driver: FlowDriver, scope: Scope) -> list[Batch]:
    return [piece for piece in driver.export(scope) if isinstance(piece, Batch)]


def ipsets_listed(place: Namespace) -> list[str]:
    """All elements of all ipsets as ipset(8) tells them, without the times that run."""
    lines = [line.split() for line in place.run(["ipset", "save"]).splitlines() if line.startswith("add")]
    return sorted(" ".join(words[1 : words.index("timeout")] if "timeout" in words else words[1:]) for words in lines)


class PromisesOfSets(FlowDriverConformance):
    """All of the contract, with a namespace for each scope that has another zone.

    Of two sets, `ports4` and `ports6`, whose keys are an address and `BEHIND`, in which the port stands.
    """

    BEHIND: bytes

    def make_sets(self, place: Namespace) -> None:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def places(self) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            self.namespaces = [Namespace(f"sets-{os.getpid()}-{name}") for name in ("one", "other")]
            for namespace in self.namespaces:
                undo.callback(namespace.close)
                self.make_sets(namespace)
            yield

    def make_scope(self) -> Scope:
        return scope_of(self.namespaces[0])

    def make_other_scope(self) -> Scope:
        return scope_of(self.namespaces[1])

    def make_shared_scope(self) -> Scope:
        zones, path = {ZoneRole.PORT: 9}, self.namespaces[0].path
        return Scope("port", "guest", zones, PORT_ADDRESSES, path, is_shared=True, neighbours=NEIGHBOUR_ADDRESSES)

    def some_flows(self, template: Template, count: int, first: int = 0) -> Batch:
        made = flows(template, count, first=first)
        if template in (IPV4, IPV6):
            name, address = (b"ports4", 4) if template == IPV4 else (b"ports6", 16)
            made.rows["nftSetName"] = np.frombuffer(name.ljust(32, b"\0"), ">u8")
            made.rows["nftSetKeyOctets"] = address + 2 + len(self.BEHIND)
            made.rows["nftOtherAddressOffset"] = NO_OTHER
            keys = [bytes(address) + (1 + first + one).to_bytes(2, "big") + self.BEHIND for one in range(count)]
            made.rows["nftSetKey"] = [np.frombuffer(key.ljust(64, b"\0"), ">u8") for key in keys]
        return made

    def has_fixed_timeouts(self, template: Template) -> bool:
        return True
