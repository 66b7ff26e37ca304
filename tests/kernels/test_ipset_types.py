"""Types of ipsets that not every kernel has."""

from __future__ import annotations

from lab.namespace import Namespace
from sami_plugin.drivers.nft_sets import NftSetsDriver
from sami_plugin.model.results import Outcome, lost_fields
from tests.sets import ipsets_listed, scope_of, told

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
        before = ipsets_listed(place)
        driver = NftSetsDriver([f"ipset {name}" for name in NAMES])
        scope = scope_of(place)
        batches = told(driver, scope)
        assert sum(map(len, batches)) == len(NAMES)
        for batch in batches:
            assert set(driver.remove(scope, batch.identities)["outcome"]) == {Outcome.REMOVED}
        assert ipsets_listed(place) == ["marked 192.0.2.77,0x0000002a"]
        for batch in batches:
            assert set(driver.insert(scope, batch)["outcome"]) == {Outcome.IMPORTED}
            kept, is_there = driver.read_back(scope, batch)
            assert is_there.all()
            assert not lost_fields(batch, kept.rows).any()
        assert ipsets_listed(place) == before
    finally:
        place.close()
