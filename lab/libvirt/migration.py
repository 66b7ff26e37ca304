"""One migration by libvirt, peer to peer, that a test may look at and disturb while it runs."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass

from lab.deadline import wait_until
from lab.errors import DeadlinePassed
from lab.libvirt.guest import Guest
from lab.libvirt.host import LibvirtHost
from lab.libvirt.journal import Entry, Journal

MIGRATION_SECONDS = 90.0
QUERY_SECONDS = 0.1
# So long may a guest be paused that is meant to be caught in its pause.
LONG_PAUSE_MILLISECONDS = 60_000


@dataclass(frozen=True, slots=True)
class Result:
    """How it ended: `words` are virsh's, times are CLOCK_MONOTONIC seconds of virsh's start and end."""

    is_ok: bool
    words: str
    began_at: float
    ended_at: float

    @property
    def seconds(self) -> float:
        """How long virsh took."""
        return self.ended_at - self.began_at


class Migration:
    """A migration that runs. Phases are waited for by what the hosts' journal says, from the beginning on."""

    def __init__(
        self, guest: Guest, source: LibvirtHost, destination: LibvirtHost, options: list[str], journal: Journal
    ) -> None:
        self.guest = guest
        self.source = source
        self.destination = destination
        self.began_at = time.monotonic()
        self._journal = journal
        words = ["virsh", "-q", "migrate", "--p2p", *options, guest.name, f"qemu+tcp://{destination.name}/system"]
        self._process = source.start(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait(self, seconds: float = MIGRATION_SECONDS) -> Result:
        """How it ended, when it has. Blocks; raises DeadlinePassed with the journal. Call it once."""
        try:
            words, _ = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            said = "\n".join(map(str, self.entries()))
            raise DeadlinePassed(f"the migration of {self.guest.name} to end; said was:\n{said}", seconds) from error
        return Result(self._process.returncode == 0, words.strip(), self.began_at, time.monotonic())

    def wait_for(self, what: str, host: LibvirtHost | None = None, seconds: float = 30.0) -> Entry:
        """See Journal.wait_for; without a host it is the source that says it."""
        return self._journal.wait_for(what, self.guest.name, (host or self.source).name, self.began_at, seconds)

    def entries(self) -> list[Entry]:
        """What both hosts said of this guest since it began."""
        return self._journal.entries(self.guest.name, self.began_at)

    def wait_until_copying(self) -> None:
        """Memory goes to the destination; the guest runs on the source."""
        self.wait_for("MIGRATION_ITERATION 1")

    def wait_until_paused(self) -> None:
        """The guest is paused on the source and the rest of its memory is on its way. Allows the pause to be long:
        needs a cable that is slow enough (LibvirtHost.slow_cable) for it to last."""
        self.wait_until_copying()
        self.source.virsh("migrate-setmaxdowntime", self.guest.name, str(LONG_PAUSE_MILLISECONDS))
        self.wait_for("SUSPENDED/MIGRATED")

    def wait_until_all_is_sent(self, seconds: float = 30.0) -> None:
        """The source's QEMU has done its part. It stays so as long as the destination's libvirtd is frozen."""
        query = json.dumps({"execute": "query-migrate"})

        def is_sent() -> bool:
            answer = json.loads(self.source.virsh("qemu-monitor-command", self.guest.name, query))
            return answer["return"]["status"] == "completed"

        wait_until(is_sent, "all memory to be sent", seconds, poll_seconds=QUERY_SECONDS)

    def abort(self) -> str:
        """`virsh domjobabort`; returns its words. Raises CommandFailed when it is refused, as in post-copy."""
        return self.source.virsh("domjobabort", self.guest.name)

    def switch_to_postcopy(self) -> None:
        """The guest goes on at the destination at once. It must have been begun with is_postcopy."""
        self.source.virsh("migrate-postcopy", self.guest.name)
