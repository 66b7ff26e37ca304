"""Every error that SAMI raises, and whose move is next.

SamiError
├── OperatorError             the operator's move: the message says what to change
│   ├── ConfigurationError        an option, a file or an argument is wrong
│   ├── NotPermitted              a capability or a permission is missing
│   └── NotAvailable              the kernel, a tool or a service is missing
│       └── HasGone                   what a router tracked is gone with it
├── RepresentationError       the sender's move: these bytes are no flow state
│   ├── Malformed                 a length, type or structure is wrong; `place` says where
│   └── NotUnderstood             well-formed, but marked as must-understand and unknown here
├── DriverError               the device's move
│   ├── UndeclaredAbility         our own move, really: a caller used what was not declared
│   ├── DeviceFailed              the device answered with an error that concerns no single flow
│   └── OutOfSync                 changes were lost: export again
├── Veto                      the migration's manager's move: this host's policy refuses the migration
├── PeerError                 the other host's move
│   ├── NotAuthorised             it asked for what it may not have
│   ├── IllegalMessage            it said what may not be said in this state; nothing has changed here
│   ├── StreamBroken              what came is not what it sent; the next stream goes on where this one ended
│   ├── PeerUnreachable           it does not answer, or the broker does not
│   └── Busy                      it is faster than this host; it sends the same again
│       └── Crowded                   it is one of too many that call; it calls again
└── JournalError              the disk's move: the journal cannot be read or written
    └── JournalDamaged            its file holds what is no journal, or not any more
"""

from __future__ import annotations


class SamiError(Exception):
    """Base of all errors that SAMI raises on purpose."""


class OperatorError(SamiError):
    """Something on this host has to be changed by its operator."""


class ConfigurationError(OperatorError):
    """An option, a file or an argument is wrong."""


class NotPermitted(OperatorError):
    """The process lacks a capability or a permission."""


class NotAvailable(OperatorError):
    """The kernel, a tool or a service that is needed is not there."""


class HasGone(NotAvailable):
    """A router or a network namespace is not on this host any more: nothing of what it tracked is."""


class RepresentationError(SamiError):
    """Bytes from elsewhere are not what they claim to be; nothing of them was used."""


class Malformed(RepresentationError):
    """A length, a type or a structure is wrong.

    `place` names the offset and the element, for example ``octet 16, set 257``.
    """

    def __init__(self, what: str, place: str) -> None:
        super().__init__(f"{what} (at {place})")
        self.what = what
        self.place = place


class NotUnderstood(RepresentationError):
    """Well-formed input holds elements that its sender marked as must-understand and that are unknown here."""

    def __init__(self, elements: tuple[str, ...]) -> None:
        super().__init__(
            f"must-understand elements are unknown here: {', '.join(elements)}; "
            "upgrade this host or let the sender leave them out"
        )
        self.elements = elements


class DriverError(SamiError):
    """A firewall driver could not do what was asked."""


class UndeclaredAbility(DriverError):
    """A caller used an ability that the driver does not declare."""


class DeviceFailed(DriverError):
    """The device answered with an error that concerns no single flow."""

    def __init__(self, what: str, errno: int | None = None) -> None:
        super().__init__(what)
        self.errno = errno


class OutOfSync(DriverError):
    """Changes of the device's state were lost; only a new export tells what is there."""


class Veto(SamiError):
    """The operator's policy refuses the migration; the message says why, and the guest stays where it is."""


class PeerError(SamiError):
    """The other host did something wrong, or nothing at all."""


class NotAuthorised(PeerError):
    """The other host asked for what it may not have."""


class IllegalMessage(PeerError):
    """The other host said what may not be said in this state; nothing has changed here."""


class StreamBroken(PeerError):
    """What came is not what the other host sent, or it says so of ours; nothing of it was used."""


class PeerUnreachable(PeerError):
    """The other host does not answer, or the broker between us does not."""


class Busy(PeerError):
    """The other host is faster than this one: nothing was taken, and it sends the same again."""


class Crowded(Busy):
    """More hosts call than may at a time, or in a second."""


class JournalError(SamiError):
    """The journal cannot be read or written."""


class JournalDamaged(JournalError):
    """The journal's file holds what is no journal, or not any more."""
