"""Types of ipsets that not every kernel has."""

from __future__ import annotations

from lab.namespace import Namespace
from sami_plugin.drivers.nft_sets import NftSetsDriver
from sami_plugin.model.flows import Batch, ZoneRole
from sami_plugin.model.results import Outcome, lost_fields
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import PORT_ADDRESSES

SETS = """create marked hash:ip,mark timeout 3600
create marked6 hash:ip,mark family inet6
create cards hash:ip,mac counters
create few bitmap:ip,mac range 192.0.2.0/24 timeout 600
add marked 192.0.2.10,0x2a
add marked 192.0.2.77,0x2a
add marked6 2001:db8:1::10,0xffffffff
add cards 192.0.2.10,02:92:00:00:00:0b packets 3 bytes 300
add few 192.0.2.10,02:92:00:00:00:0c
"""
NAMES = ("marked", "marked6", "cards", "few")


def test_elements_of_these_types_come_back_as_they_were() -> None:
    place = Namespace("ipset-types")
    try:
        place.run(["ipset", "restore"], SETS)
        before = listed(place)
        driver = NftSetsDriver([f"ipset {name}" for name in NAMES])
        scope = Scope("port", "guest", {ZoneRole.PORT: 7}, PORT_ADDRESSES, place.path)
        batches = [piece for piece in driver.export(scope) if isinstance(piece, Batch)]
        assert sum(map(len, batches)) == len(NAMES)
        for batch in batches:
            assert set(driver.remove(scope, batch.identities)["outcome"]) == {Outcome.REMOVED}
        assert listed(place) == ["marked 192.0.2.77,0x0000002a"]
        for batch in batches:
            assert set(driver.insert(scope, batch)["outcome"]) == {Outcome.IMPORTED}
            kept, is_there = driver.read_back(scope, batch)
            assert is_there.all()
            assert not lost_fields(batch, kept.rows).any()
        assert listed(place) == before
    finally:
        place.close()


def listed(place: Namespace) -> list[str]:
    """All elements as ipset tells them, without the times that run."""
    lines = [line.split() for line in place.run(["ipset", "save"]).splitlines() if line.startswith("add")]
    return sorted(" ".join(words[1 : words.index("timeout")] if "timeout" in words else words[1:]) for words in lines)
