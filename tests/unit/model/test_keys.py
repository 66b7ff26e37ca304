"""Finding flows by key, against a dictionary."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.model import keys
from sami_plugin.model.flows import TEMPLATES, Batch, Template
from sami_plugin.model.keys import FlowTable, KeyIndex, key_words, last_of_each_key
from sami_plugin.testing.conformance import flows

EVERY = pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda each: each.name)
TCP = TEMPLATES["tcp-ipv4"]
few_numbers = st.lists(st.integers(0, 12), max_size=20)


def numbered(template: Template, numbers: list[int], first_id: int = 1) -> Batch:
    """A flow per number: the same number is the same key. Ids count up."""
    chosen = flows(template, 13).take(np.array(numbers, np.intp))
    chosen.rows["flowId"] = np.arange(first_id, first_id + len(numbers))
    return chosen


def keys_of(batch: Batch) -> list[bytes]:
    return [row.tobytes()[: batch.template.key_octets] for row in batch.rows]


@EVERY
def test_words_are_the_keys(template: Template) -> None:
    batch = flows(template, 5)
    words = key_words(batch)
    octets = template.key_octets
    assert [row.tobytes()[:octets] for row in words] == keys_of(batch)
    assert not any(any(row.tobytes()[octets:]) for row in words)
    assert key_words(batch.identities).tobytes() == words.tobytes()
    assert key_words(Batch(template, batch.rows[::2])).tobytes() == words[::2].tobytes()


@given(few_numbers, few_numbers)
def test_index_finds_what_a_dictionary_finds(held: list[int], wanted: list[int]) -> None:
    batch, sought = numbered(TCP, held), numbered(TCP, wanted)
    found = KeyIndex(batch).find(sought)
    for number, at in zip(wanted, found, strict=True):
        assert (at >= 0) == (number in held)
        assert at < 0 or held[at] == number


@given(few_numbers)
def test_last_of_each_key_is_the_last(held: list[int]) -> None:
    last = {number: position for position, number in enumerate(held)}
    assert last_of_each_key(numbered(TCP, held)).tolist() == sorted(last.values())


@given(few_numbers, few_numbers)
def test_hash_decides_about_speed_and_not_about_identity(held: list[int], wanted: list[int]) -> None:
    usual = keys._hashes
    keys._hashes = lambda words: np.zeros(len(words), np.uint64)
    try:
        test_index_finds_what_a_dictionary_finds.hypothesis.inner_test(held, wanted)
    finally:
        keys._hashes = usual


# Keys that a tenant could have aimed at an earlier hash of ours, which was public: 2**64 over the golden ratio, and a
# shift by half a word.
OLD_MULTIPLIER = 0x9E3779B97F4A7C15
TCP_IPV6 = TEMPLATES["tcp-ipv6"]
FREE_WORD = 2
"""The word of a key of tcp-ipv6 that ends in six octets of the destination's address; the next is its next eight."""


def mixed(state: int, word: int, multiplier: int) -> int:
    product = (state ^ word) * multiplier % (1 << 64)
    return product ^ product >> 32


def flows_of_words(pairs: list[tuple[int, int]]) -> Batch:
    """A flow per pair; all are alike but for these two words of the destination's address."""
    batch = flows(TCP_IPV6, 1)
    words = np.repeat(key_words(batch), len(pairs), axis=0)
    words[:, FREE_WORD] = (words[:, FREE_WORD] & np.uint64(0xFFFF)) | np.array(
        [first << 16 for first, _ in pairs], np.uint64
    )
    words[:, FREE_WORD + 1] = [second for _, second in pairs]
    octets = TCP_IPV6.key_octets
    rows = TCP_IPV6.empty(len(pairs))
    rows.view(np.uint8).reshape(len(rows), -1)[:, :octets] = words.view(np.uint8).reshape(len(rows), -1)[:, :octets]
    return Batch(TCP_IPV6, rows)


def aimed_at_one_multiplier(count: int, multiplier: int) -> Batch:
    """Flows that meet in one hash: the second word takes back what the first has changed."""
    start = [int(word) for word in key_words(flows(TCP_IPV6, 1))[0]]
    state = 0
    for word in start[:FREE_WORD]:
        state = mixed(state, word, multiplier)
    firsts = [(start[FREE_WORD] & 0xFFFF) | number << 16 for number in range(count)]
    return flows_of_words([(first >> 16, mixed(state, first, multiplier)) for first in firsts])


def aimed_at_any_multiplier() -> Batch:
    """1024 flows, of which 32 at a time meet in one hash whatever the multiplier is: only high bits differ."""
    return flows_of_words([(first << 43, second << 59 | second << 27) for first in range(32) for second in range(32)])


def old_hashes(batch: Batch, multiplier: int) -> list[int]:
    made = []
    for words in key_words(batch):
        state = 0
        for word in words:
            state = mixed(state, int(word), multiplier)
        made.append(state)
    return made


def test_keys_that_were_aimed_at_the_hash_are_found_and_do_not_meet() -> None:
    aimed, spread = aimed_at_one_multiplier(2000, OLD_MULTIPLIER), aimed_at_any_multiplier()
    assert len(set(old_hashes(aimed, OLD_MULTIPLIER))) == 1
    for multiplier in (OLD_MULTIPLIER, 0x5851F42D4C957F2D, 0xB5026F5AA96619E9):
        assert len(set(old_hashes(spread, multiplier))) == 32
    for batch in (aimed, spread):
        assert len(set(keys_of(batch))) == len(batch)
        held, absent = batch.take(np.arange(0, len(batch), 2)), batch.take(np.arange(1, len(batch), 2))
        assert KeyIndex(held).find(held).tolist() == list(range(len(held)))
        assert (KeyIndex(held).find(absent) == -1).all()
        assert len(np.unique(keys._hashes(key_words(batch)))) > len(batch) - 3


def test_hash_is_another_in_another_process() -> None:
    program = "from sami_plugin.model import keys; print([int(one) for one in keys._MULTIPLIERS])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    first, second = (
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert first.stdout != second.stdout


steps = st.lists(st.tuples(st.sampled_from(["put", "discard"]), few_numbers), max_size=30)


@given(steps, st.sampled_from(["tcp-ipv4", "udp-nat-ipv6", "icmp-ipv6"]))
def test_table_holds_what_a_dictionary_holds(todo: list[tuple[str, list[int]]], name: str) -> None:
    template = TEMPLATES[name]
    table, model, next_id = FlowTable(), {}, 1
    for verb, numbers in todo:
        batch = numbered(template, numbers, next_id)
        next_id += len(numbers)
        for number, row in zip(numbers, batch.rows, strict=True):
            if verb == "put":
                model[number] = int(row["flowId"])
            else:
                model.pop(number, None)
        (table.put if verb == "put" else table.discard)(batch if verb == "put" else batch.identities)
        assert len(table) == len(model)
    everyone = numbered(template, list(range(13)))
    known, ids = table.find(everyone)
    assert known.tolist() == [number in model for number in range(13)]
    assert ids.tolist() == [model.get(number, 0) for number in range(13)]
    held, rows = table.rows_of(everyone)
    assert held.tolist() == known.tolist()
    assert rows["flowId"].tolist() == ids.tolist()
    assert sorted(row["flowId"] for batch in table.batches() for row in batch.rows) == sorted(model.values())


def test_flow_that_becomes_translated_is_one_flow_still() -> None:
    table = FlowTable()
    table.put(numbered(TCP, [0, 1]))
    table.put(numbered(TEMPLATES["tcp-nat-ipv4"], [1], first_id=9))
    assert len(table) == 2
    assert table.find(numbered(TCP, [0, 1]))[1].tolist() == [1, 9]
    table.put(numbered(TCP, [1], first_id=20))
    assert [batch.template.name for batch in table.batches()] == ["tcp-ipv4"]
    assert table.find(numbered(TCP, [0, 1]))[1].tolist() == [1, 20]


def test_keys_of_other_templates_do_not_meet() -> None:
    table = FlowTable()
    for template in TEMPLATES.values():
        if "-nat-" not in template.name:
            table.put(flows(template, 3))
    for template in TEMPLATES.values():
        if "-nat-" not in template.name:
            assert table.find(flows(template, 3))[0].all()
    table.discard(flows(TEMPLATES["udp-ipv4"], 3).identities)
    assert table.find(flows(TCP, 3))[0].all()
    assert not table.find(flows(TEMPLATES["udp-ipv4"], 3))[0].any()
