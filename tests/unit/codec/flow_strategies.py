"""Hypothesis strategies of flows: any values that a record may have."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from sami_plugin.drivers.loader import load_kinds
from sami_plugin.model.flows import TEMPLATES, Batch, FirewallEvent, Template, ZoneRole
from sami_plugin.model.protocols import SctpState, TcpState

load_kinds()

PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58, "sctp": 132, "udplite": 136, "gre": 47}

FLOW_TEMPLATES = tuple(TEMPLATES.values())
# Names of flows of other templates are on the wire what those of plain ones are, and come back as those.
NAME_TEMPLATES = tuple(each.identity for each in FLOW_TEMPLATES if each == each.plain)


def protocol_of(template: Template) -> int:
    kind = template.name.partition("-")[0]
    return PROTOCOLS["icmpv6" if kind == "icmp" and template.is_ipv6 else kind]


@st.composite
def batches_of(draw: st.DrawFn, template: Template, most: int = 12) -> Batch:
    count = draw(st.integers(1, most))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    rows = template.empty(count)
    rows.view(np.uint8)[:] = generator.choice([0, 1, 2, 127, 128, 255, *range(3, 100)], rows.view(np.uint8).shape)
    if template.is_flow:
        rows["protocolIdentifier"] = protocol_of(template)
    rows["zoneRole"] = generator.choice(list(map(int, ZoneRole)), count)
    for field, values in (
        ("tcpConnectionState", TcpState),
        ("sctpAssociationState", SctpState),
        ("tcpWindowScale", range(15)),
        ("reverseTcpWindowScale", range(15)),
        ("firewallEvent", FirewallEvent),
        ("expectationNatDirection", range(3)),
    ):
        if field in (rows.dtype.names or ()):
            rows[field] = generator.choice(list(map(int, values)), count)
    return Batch(template, rows)


any_template = st.sampled_from(FLOW_TEMPLATES + NAME_TEMPLATES)
any_batch = any_template.flatmap(batches_of)
