"""What an export tells of what was told before."""

from __future__ import annotations

import dataclasses

from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.leaving import Leaving, Sweep
from sami_plugin.model.flows import TEMPLATES, Batch, ZoneRole
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import PORT_ADDRESSES, flows


def test_flow_that_has_become_barred_is_gone() -> None:
    """The firewall marks the flows of a rule that was removed: no guest may take them along."""
    driver = MemoryDriver(MemoryDevice("a"))
    scope = Scope("port", "guest", {ZoneRole.PORT: 7}, PORT_ADDRESSES)
    barring = dataclasses.replace(scope, barred_marks=1)
    made = flows(TEMPLATES["tcp-ipv4"], 3)
    made.rows["flowMark"] = 0
    driver.insert(scope, made)
    port = Leaving(barring, None)
    for told in driver.export(barring):
        assert isinstance(told, Batch)
        port.exported.put(told)
    made.rows["flowMark"] = (0, 1, 2)
    driver.insert(scope, made)
    sweep = Sweep([port], driver)
    assert sweep.advance(100)
    ((_, gone, changed),) = sweep.difference()
    _, barred, marked = made.rows["sourceTransportPort"].tolist()
    assert [batch.rows["sourceTransportPort"].tolist() for batch in gone] == [[barred]]
    assert marked in changed[0].rows["sourceTransportPort"]
    assert barred not in changed[0].rows["sourceTransportPort"]
