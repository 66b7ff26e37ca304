"""A driver without a device: it keeps what the host's own devices have no use for, for a host that has.

A vendor's firewall knows what no other does. When a guest leaves such a host, what is the vendor's own goes along and
is put here; when the guest goes on to a host with that vendor's firewall, it goes there. Records are kept by guest and
port, each port's in a file, and their time stands still.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sami_plugin.drivers.base import Capabilities, FlowDriver, Watch
from sami_plugin.errors import DeviceFailed, NotAvailable, UndeclaredAbility
from sami_plugin.model.flows import TEMPLATES, Batch, Omitted, Rows, has_end_in
from sami_plugin.model.keys import FlowTable
from sami_plugin.model.results import Outcome, Reason, Results, results
from sami_plugin.model.scope import Scope

SECONDS_OF_DAY = 86400
MOST_RECORDS = 10_000
"""Of one port: who sends more is not keeping things for the way back."""


class DepositDriver(FlowDriver):
    """Takes all kinds that are none of flows and that no driver before it takes."""

    def __init__(self, folder: str = "/var/lib/sami/deposit", days: int = 30) -> None:
        """What nobody has fetched for so many days is thrown away: its guest has gone otherwise.

        The folder is made when there is something to keep.

        :raises NotAvailable: what is there is no folder that can be used; the message says why.
        """
        self._folder, self._days = Path(folder), days
        self._lock = threading.Lock()
        try:
            self._throw_away()
        except OSError as error:
            raise NotAvailable(f"[deposit] folder: {folder} cannot be used: {error.strerror}") from error

    def capabilities(self, scope: Scope | None = None) -> Capabilities:
        kinds = frozenset(name for name, template in TEMPLATES.items() if not template.is_flow)
        return Capabilities(kinds, False, None, 0, f"deposit of {self._folder}", frozenset())

    def watch(self, scope: Scope) -> Watch:
        raise UndeclaredAbility("nothing changes what is in the deposit")

    def export(self, scope: Scope) -> Iterator[Batch | Omitted]:
        if scope.zones:
            with self._lock:
                kept = list(self._read(scope).batches())
            # Without the lock, for who takes one may not come for the next. Of a guest before this one may be more.
            yield from (own for batch in kept if len(own := batch.take(scope.owns(batch))))

    def insert(self, scope: Scope, batch: Batch) -> Results:
        if batch.template.name not in self.capabilities().templates:
            return results(len(batch), Outcome.REFUSED, Reason.NOT_DECLARED)
        made = results(len(batch))
        with self._lock:
            table = self._read(scope)
            is_beyond = ~table.find(batch)[0]
            is_beyond &= np.cumsum(is_beyond) > MOST_RECORDS - len(table)
            for reason, which in (
                (Reason.NO_PLACE, is_beyond),
                (Reason.FOREIGN_ADDRESS, ~has_end_in(batch, scope.addresses)),
                (Reason.INVALID, ~scope.has_zone_of(batch)),
            ):
                made["outcome"][which], made["reason"][which] = Outcome.REFUSED, reason
            taken = batch.take(made["outcome"] == Outcome.IMPORTED)
            taken.rows["flowId"] = 0
            table.put(taken)
            if len(taken):
                self._write(scope, table)
        return made

    def renew(self, scope: Scope, batch: Batch) -> Results:
        made = results(len(batch), Outcome.ABSENT)
        made["outcome"][self.read_back(scope, batch)[1]] = Outcome.PRESENT
        return made

    def read_back(self, scope: Scope, batch: Batch) -> tuple[Batch, npt.NDArray[np.bool_]]:
        with self._lock:
            is_there, rows = self._read(scope).rows_of(batch)
        is_there &= scope.owns(batch)
        rows[~is_there] = batch.template.empty(1)[0]
        return Batch(batch.template, rows), is_there

    def remove(self, scope: Scope, identities: Batch) -> Results:
        made = results(len(identities), Outcome.ABSENT)
        with self._lock:
            table = self._read(scope)
            is_there = table.find(identities)[0] & scope.owns(identities)
            made["outcome"][is_there] = Outcome.REMOVED
            table.discard(identities.take(is_there))
            if is_there.any():
                self._write(scope, table)
        return made

    def _path(self, scope: Scope) -> Path:
        # Without Neutron a tap's name is the next guest's, and so may its address be.
        whose = f"{scope.guest} {scope.port}".encode()
        return self._folder / f"{hashlib.sha256(whose).hexdigest()[:32]}.npz"

    def _read(self, scope: Scope) -> FlowTable:
        """What is kept of the port, of the kinds that are known now."""
        table = FlowTable()
        for name, rows in self._kept(scope).items():
            if _is_known(name, rows):
                table.put(Batch(TEMPLATES[name], rows))
        return table

    def _kept(self, scope: Scope) -> dict[str, Rows]:
        """By kind, what the port's file has; a package may be gone for a while, and its kinds with it."""
        try:
            with np.load(self._path(scope), allow_pickle=False) as kept:
                return {name: kept[name] for name in kept.files}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DeviceFailed(f"{self._path(scope)} cannot be read: {error.strerror or error}") from error
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DeviceFailed(f"{self._path(scope)} is no deposit any more: {error}; remove it") from error

    def _write(self, scope: Scope, table: FlowTable) -> None:
        path = self._path(scope)
        kept: dict[str, Any] = {name: rows for name, rows in self._kept(scope).items() if not _is_known(name, rows)}
        kept |= {batch.template.name: batch.rows for batch in table.batches()}
        try:
            if not kept:
                path.unlink(missing_ok=True)
                return
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".new", delete=False) as file:
                try:
                    np.savez(file, **kept)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, path)
                except OSError:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            raise DeviceFailed(f"{path} cannot be written: {error.strerror}; make room in {self._folder}") from error

    def _throw_away(self) -> None:
        days = {".npz": self._days, ".new": 1}  # the agent may be writing one
        for path in self._folder.iterdir() if self._folder.exists() else ():
            oldest = time.time() - days.get(path.suffix, math.inf) * SECONDS_OF_DAY
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()


def _is_known(name: str, rows: Rows) -> bool:
    return name in TEMPLATES and TEMPLATES[name].dtype == rows.dtype
