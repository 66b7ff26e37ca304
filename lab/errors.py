"""What can go wrong in the lab.

LabError
 +-- LabUnavailable    this machine lets us make no namespaces; the operator's move
 +-- CommandFailed     a tool (ip, iptables-restore, ...) refused; its words are in the message
 +-- DeadlinePassed    a condition did not come true in time
 +-- GuestDied         a guest of lab.kernels ended before its command did
 +-- IllegalMove       a migration that cannot be: the guest is elsewhere, or already moving; the caller's move
"""


class LabError(Exception):
    """Any failure of the lab itself, never of what is tested in it."""


class LabUnavailable(LabError):
    """The lab cannot run here. `missing` names what is not there, `mend` what to do about it."""

    def __init__(self, missing: str, mend: str) -> None:
        super().__init__(f"the lab cannot run here: {missing}; {mend}")
        self.missing = missing
        self.mend = mend


class CommandFailed(LabError):
    """A command ended with another exit code than 0."""

    def __init__(self, argv: list[str], code: int, words: str) -> None:
        super().__init__(f"{' '.join(argv)} ended with {code}: {words.strip()}")
        self.argv = argv
        self.code = code
        self.words = words


class DeadlinePassed(LabError):
    """`what` did not happen within `seconds`."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"waited {seconds:g} s in vain for {what}")
        self.what = what
        self.seconds = seconds


class GuestDied(LabError):
    """A guest that ran a command is gone, and has left no exit code."""

    def __init__(self, console: str) -> None:
        super().__init__(f"the guest died; its console: {console}")


class IllegalMove(LabError):
    """A migration was asked for that cannot be; nothing was changed and nobody was told."""
