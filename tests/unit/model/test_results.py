"""What became of flows."""

from __future__ import annotations

import numpy as np
import pytest

from sami_plugin.model.flows import TEMPLATES, FlowStatus
from sami_plugin.model.results import (
    COMPARED_BITS,
    NOT_COMPARED,
    WORDS,
    Outcome,
    Reason,
    has_changed,
    is_in_device,
    lost_fields,
    results,
)
from sami_plugin.testing.conformance import flows

TCP = TEMPLATES["tcp-nat-ipv6"]
STATE = [field[0] for field in TCP.state]


def test_every_reason_has_words() -> None:
    assert set(WORDS) == set(Reason)
    assert all(WORDS[reason] for reason in Reason if reason is not Reason.NONE)


def test_imported_degraded_and_present_are_in_the_device() -> None:
    made = results(len(Outcome))
    made["outcome"] = list(Outcome)
    held = {Outcome(code) for code in made["outcome"][is_in_device(made)]}
    assert held == {Outcome.IMPORTED, Outcome.DEGRADED, Outcome.PRESENT}


def test_fields_that_are_treated_apart_are_fields() -> None:
    state = {field[0] for template in TEMPLATES.values() for field in template.state}
    assert set(COMPARED_BITS) <= state
    assert state >= NOT_COMPARED


def test_same_rows_have_lost_nothing() -> None:
    batch = flows(TCP, 4)
    assert not lost_fields(batch, batch.rows).any()


@pytest.mark.parametrize("field", STATE)
def test_a_field_that_differs_is_lost_unless_it_differs_by_nature(field: str) -> None:
    sent = flows(TCP, 3)
    kept = sent.rows.copy()
    kept[field][1] = 0
    wanted = 0 if field in NOT_COMPARED else 1 << STATE.index(field)
    assert lost_fields(sent, kept).tolist() == [0, wanted, 0]


def test_counter_that_has_grown_is_no_loss_and_one_that_is_less_is() -> None:
    extended = TEMPLATES["tcp-nat-extended-ipv6"]
    sent = flows(extended, 3)
    kept = sent.rows.copy()
    kept["octetTotalCount"] += np.array([0, 7, -1], np.int64).astype(np.uint64)
    kept["flowStartMilliseconds"][0] += np.uint64(1)
    names = [name for name, *_ in extended.state]
    assert names.index("flowStartMilliseconds") > 32, "or nothing says that there are bits enough"
    bits = [1 << names.index(name) for name in ("flowStartMilliseconds", "octetTotalCount")]
    assert lost_fields(sent, kept).tolist() == [bits[0], 0, bits[1]]


def test_flow_of_which_packets_were_counted_has_not_changed() -> None:
    now = flows(TEMPLATES["udp-extended-ipv4"], 4)
    before = now.rows.copy()
    before["reversePacketTotalCount"] -= np.uint64(1)
    before["remainingTimeoutSeconds"] += np.uint32(9)
    before["flowId"][1] += 1
    before["flowMark"][2] += 1
    before["flowStartMilliseconds"][3] += np.uint64(1)
    assert has_changed(now, before).tolist() == [False, True, True, True]


def test_bits_that_the_device_adds_are_no_loss() -> None:
    sent = flows(TCP, 2)
    kept = sent.rows.copy()
    kept["conntrackStatus"] |= np.uint32(FlowStatus.HELPER)
    kept["tcpTrackingFlags"] |= np.uint8(0x20)
    assert not lost_fields(sent, kept).any()
