"""One description of each kind of flow, and that everything else has room for it."""

from __future__ import annotations

import numpy as np
import pytest

from sami_plugin.drivers.linux_conntrack import attributes as nl
from sami_plugin.model import protocols
from sami_plugin.model.flows import TEMPLATES, Template, turned_round
from sami_plugin.model.protocols import PROTOCOLS, Protocol, SctpState
from sami_plugin.testing.conformance import flows

EVERY = pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda each: each.name)
EVERY_TEMPLATE = pytest.mark.parametrize(
    "template", [one for one in TEMPLATES.values() if one.is_flow], ids=lambda each: each.name
)

# Written out from IANA's registry of protocol numbers, not from the code.
IANA_NUMBERS = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "udplite": 136, "sctp": 132, "gre": 47}


def test_numbers_are_ianas() -> None:
    assert {each.name: each.number for each in PROTOCOLS} == IANA_NUMBERS


@EVERY
def test_template_has_the_identifiers_and_the_state_of_its_protocol(protocol: Protocol) -> None:
    for family in protocol.families:
        template = TEMPLATES[f"{protocol.kind}-{family}"]
        assert template.protocol is template.identity.protocol is protocol
        assert template.key[-len(protocol.identifiers.fields) :] == protocol.identifiers.fields
        assert template.state[len(template.state) - len(protocol.state) :] == protocol.state
        translated, nat = TEMPLATES[f"{protocol.kind}-nat-{family}"], f"postNAT{{}}{family.replace('ip', 'IP')}Address"
        behind = tuple(field[0] for field in translated.state[len(template.state) :])
        assert (translated.key, translated.state[: len(template.state)]) == (template.key, template.state)
        assert behind == (nat.format("Source"), nat.format("Destination"), *protocol.identifiers.behind.values())


@EVERY
def test_linux_has_a_name_for_every_identifier(protocol: Protocol) -> None:
    assert {part.field for part in nl.IDENTIFIERS[protocol.identifiers]} == set(protocol.identifiers.names)


@EVERY
def test_answer_of_an_answer_is_the_question(protocol: Protocol) -> None:
    assert np.array_equal(protocol.inverse[protocol.inverse], np.arange(256))
    assert not protocol.inverse.flags.writeable


@EVERY_TEMPLATE
def test_flow_turned_round_is_another_and_turned_twice_the_same(template: Template) -> None:
    sent = flows(template, 3)
    turned = turned_round(sent)
    assert turned.rows.tobytes() != sent.rows.tobytes()
    assert turned_round(turned).rows.tobytes() == sent.rows.tobytes()
    assert np.array_equal(turned.rows[sent.source_field], sent.rows[sent.destination_field])
    for name, *_ in template.state:
        assert np.array_equal(turned.rows[name], sent.rows[name])


@pytest.mark.parametrize(("number", "name"), [(6, "tcp"), (58, "icmpv6"), (2, "igmp"), (33, "dccp"), (99, "99")])
def test_protocols_are_called_by_name_where_they_have_one(number: int, name: str) -> None:
    assert protocols.name_of(number) == name


# Written out from RFC 3873 (sctpAssocState) and RFC 9260 section 4, not from the code.
RFC_3873 = ("closed", "cookieWait", "cookieEchoed", "established", "shutdownPending", "shutdownSent",
            "shutdownReceived", "shutdownAckSent")  # fmt: skip


def test_states_of_sctp_have_the_numbers_of_its_mib() -> None:
    for number, name in enumerate(RFC_3873, 1):
        assert SctpState(number).name.replace("_", "").lower() == name.lower()
    assert {state for state in SctpState if state > len(RFC_3873)} == {SctpState.HEARTBEAT_SENT, SctpState.NONE}


def test_kind_that_nobody_described_has_no_protocol() -> None:
    with pytest.raises(AssertionError, match="are called carp"):
        protocols.of_template("carp-ipv4", "ipv4")
