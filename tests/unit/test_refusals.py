"""Refusals are counted in memory, bounded, and printable whatever was said; the disk is written by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from lab.deadline import wait_until
from sami_plugin import refusals
from sami_plugin.errors import JournalError, NotAuthorised
from sami_plugin.refusals import Refusals
from tests.unit.threads import no_thread_once


class Disk:
    """A journal that can be slow, or full."""

    def __init__(self) -> None:
        self.written: list[dict[tuple[str, str], int]] = []
        self.is_free = threading.Event()
        self.is_free.set()
        self.is_full = False

    def count_refusals(self, counts: Mapping[tuple[str, str], int]) -> None:
        assert self.is_free.wait(10)
        if self.is_full:
            raise JournalError("the disk is full")
        self.written.append(dict(counts))


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def made(disk: Disk) -> Refusals:
    journal: Any = disk
    return Refusals("host-a", journal)


def test_many_are_one_line_in_the_log_and_one_write(
    made: Refusals, disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "WRITE_SECONDS", 0.05)
    for _ in range(500):
        made.note("host-x", NotAuthorised("no"))
    wait_until(lambda: disk.written, "the count to be written")
    assert sum(sum(counts.values()) for counts in disk.written) == 500
    assert len(disk.written) <= 2
    assert caplog.text.count("host-x was refused: NotAuthorised: no") == 1


def test_who_is_refused_does_not_wait_for_the_disk(made: Refusals, disk: Disk) -> None:
    disk.is_free.clear()
    made.note("host-x", NotAuthorised("no"))
    writing = threading.Thread(target=made.write)
    writing.start()
    began = time.monotonic()
    made.note("host-x", NotAuthorised("no"))
    assert time.monotonic() - began < 0.5
    disk.is_free.set()
    writing.join()
    made.write()
    assert disk.written == [{("host-x", "NotAuthorised: no"): 1}] * 2


def test_refusal_that_finds_no_thread_to_write_is_written_with_the_next(
    made: Refusals, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "WRITE_SECONDS", 0.05)
    with no_thread_once(monkeypatch, "sami-refusals") as refused:
        made.note("host-x", NotAuthorised("no"))
        assert refused
        made.note("host-x", NotAuthorised("no"))
    wait_until(lambda: disk.written, "the count to be written")
    assert disk.written == [{("host-x", "NotAuthorised: no"): 2}]


def test_disk_that_is_full_is_told(made: Refusals, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.is_full = True
    made.note("host-x", NotAuthorised("no"))
    made.write()
    assert "the disk is full" in caplog.text


def test_words_of_strangers_are_short_and_printable(
    made: Refusals, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    made.note("x\n2026-01-01 forged \x1b[2J\ud800" + "y" * 1_000_000, NotAuthorised("z" * 1_000_000))
    made.write()
    ((who, reason),) = disk.written[0]
    assert who.startswith("x\ufffd2026-01-01 forged \ufffd[2J\ufffdyyy")
    assert (len(who), len(reason)) == (512, 512)
    assert caplog.text.count("\n") == 1


def test_kinds_in_memory_are_bounded(made: Refusals, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "_write_soon", lambda: True)  # not before all are noted, however slow the machine is
    for number in range(3 * refusals.MOST_KINDS):
        made.note(f"host-{number}", NotAuthorised("no"))
    made.write()
    assert sum(map(len, disk.written)) == refusals.MOST_KINDS
    assert len(made._known) <= refusals.MOST_KINDS
