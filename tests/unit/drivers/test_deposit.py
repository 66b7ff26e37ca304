"""What is kept for other hosts' devices is there again when it is asked for, after a start too."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from sami_plugin.drivers import deposit
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.drivers.deposit import DepositDriver
from sami_plugin.errors import DeviceFailed, NotAvailable
from sami_plugin.model.flows import TEMPLATES, Batch, ZoneRole
from sami_plugin.model.results import Outcome, Reason
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import NEIGHBOUR_ADDRESSES, PORT_ADDRESSES, FlowDriverConformance, flows

SCOPE = Scope("port", "guest", {ZoneRole.PORT: 7}, PORT_ADDRESSES)


class TestDeposit(FlowDriverConformance):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self.path = tmp_path / "deposit"

    def make_driver(self) -> FlowDriver:
        return DepositDriver(str(self.path))

    def make_scope(self) -> Scope:
        return SCOPE

    def make_other_scope(self) -> Scope:
        return Scope("other", "another", {ZoneRole.PORT: 8}, PORT_ADDRESSES)

    def make_shared_scope(self) -> Scope:
        zones = {ZoneRole.PORT: 9}
        return Scope("shared", "guest", zones, PORT_ADDRESSES, is_shared=True, neighbours=NEIGHBOUR_ADDRESSES)

    def has_fixed_timeouts(self, template: object) -> bool:
        return True


@pytest.fixture
def records() -> Batch:
    return flows(TEMPLATES["nft-set-element-ipv4"], 3)


def kept(folder: Path) -> int:
    return sum(map(len, DepositDriver(str(folder)).export(SCOPE)))  # type: ignore[arg-type]


def test_it_is_there_after_a_start_and_the_file_goes_with_the_last_record(tmp_path: Path, records: Batch) -> None:
    DepositDriver(str(tmp_path)).insert(SCOPE, records)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    (told,) = DepositDriver(str(tmp_path)).export(SCOPE)
    assert isinstance(told, Batch)
    assert told.rows["nftSetKey"].tolist() == records.rows["nftSetKey"].tolist()
    assert set(DepositDriver(str(tmp_path)).remove(SCOPE, told.identities)["outcome"]) == {Outcome.REMOVED}
    assert not list(tmp_path.iterdir())


def test_the_next_guest_with_the_same_tap_and_address_has_nothing_of_the_one_before(
    tmp_path: Path, records: Batch
) -> None:
    DepositDriver(str(tmp_path)).insert(SCOPE, records)
    assert list(DepositDriver(str(tmp_path)).export(replace(SCOPE, guest="next"))) == []
    assert kept(tmp_path) == 3


def test_what_nobody_has_fetched_is_thrown_away_at_last(tmp_path: Path, records: Batch) -> None:
    DepositDriver(str(tmp_path), days=2).insert(SCOPE, records)
    (path,) = tmp_path.iterdir()
    half = tmp_path / "half.new"
    half.touch()
    DepositDriver(str(tmp_path))
    assert half.exists(), "an agent may be writing it"
    os.utime(half, (0, 0))
    for days, left in ((1.9, 3), (2.1, 0)):
        then = time.time() - days * deposit.SECONDS_OF_DAY
        os.utime(path, (then, then))
        DepositDriver(str(tmp_path), days=2)
        assert kept(tmp_path) == left
    assert not list(tmp_path.iterdir())


def test_kind_that_is_not_known_any_more_costs_nothing_else(
    tmp_path: Path, records: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = DepositDriver(str(tmp_path))
    driver.insert(SCOPE, records)
    others = flows(TEMPLATES["nft-set-element-ipv6"], 2)
    driver.insert(SCOPE, others)
    with monkeypatch.context() as patch:
        known = {name: one for name, one in TEMPLATES.items() if name != "nft-set-element-ipv4"}
        patch.setattr(deposit, "TEMPLATES", known)
        assert [len(one) for one in driver.export(SCOPE)] == [2]  # type: ignore[arg-type]
        driver.remove(SCOPE, others.identities)
        assert not list(driver.export(SCOPE))
    assert [len(one) for one in driver.export(SCOPE)] == [3], "its package came back"  # type: ignore[arg-type]


def test_more_than_one_keeps_is_refused_by_name(
    tmp_path: Path, records: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deposit, "MOST_RECORDS", 2)
    made = DepositDriver(str(tmp_path)).insert(SCOPE, records)
    assert made["reason"].tolist() == [Reason.NONE, Reason.NONE, Reason.NO_PLACE]
    again = DepositDriver(str(tmp_path)).insert(SCOPE, records)
    assert again["reason"].tolist() == made["reason"].tolist(), "what is there takes no place more"


def test_flows_are_left_to_firewalls(tmp_path: Path) -> None:
    made = DepositDriver(str(tmp_path)).insert(SCOPE, flows(TEMPLATES["udp-ipv4"], 1))
    assert made["reason"].tolist() == [Reason.NOT_DECLARED]


def test_spoiled_file_is_told_and_left(tmp_path: Path, records: Batch) -> None:
    driver = DepositDriver(str(tmp_path))
    driver.insert(SCOPE, records)
    (path,) = tmp_path.iterdir()
    for octets in (path.read_bytes()[:50], b"", b"PK" + bytes(200)):
        path.write_bytes(octets)
        for work in (lambda: list(driver.export(SCOPE)), lambda: driver.insert(SCOPE, records)):
            with pytest.raises(DeviceFailed, match=r"is no deposit any more.*remove it"):
                work()
        assert path.read_bytes() == octets


def test_file_that_cannot_be_read_for_now_is_not_to_be_removed(
    tmp_path: Path, records: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = DepositDriver(str(tmp_path))
    driver.insert(SCOPE, records)
    monkeypatch.setattr(np, "load", mock.Mock(side_effect=OSError(24, "Too many open files")))
    with pytest.raises(DeviceFailed, match=r"cannot be read: Too many open files$"):
        list(driver.export(SCOPE))


def test_full_disk_is_told_and_leaves_what_was_there(
    tmp_path: Path, records: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = DepositDriver(str(tmp_path))
    driver.insert(SCOPE, records)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeviceFailed, match="No space left on device; make room"):
        driver.remove(SCOPE, records.take(np.array([0])).identities)
    assert len(list(tmp_path.iterdir())) == 1
    assert kept(tmp_path) == 3


def test_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotAvailable, match="folder"):
        DepositDriver(str(tmp_path / "file"))


def test_export_that_is_not_read_to_its_end_keeps_nobody_out(tmp_path: Path, records: Batch) -> None:
    driver = DepositDriver(str(tmp_path))
    driver.insert(SCOPE, records)
    reading = iter(driver.export(SCOPE))
    assert next(reading)
    assert not driver._lock.locked()


def test_records_of_a_guest_before_this_one_are_not_this_one_s(tmp_path: Path, records: Batch) -> None:
    """It had a device of the same name."""
    driver = DepositDriver(str(tmp_path))
    driver.insert(SCOPE, records)
    assert list(driver.export(replace(SCOPE, guest="another", addresses=NEIGHBOUR_ADDRESSES))) == []
    assert kept(tmp_path) == len(records)
