"""The contract of scope finders (stevedore namespace `sami.scopes`)."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Self

from sami_plugin.model.flows import Addresses
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.scope import Scope

if TYPE_CHECKING:
    from oslo_config import cfg


class ScopeFinder(abc.ABC):
    """Answers from what this host knows; what came with a guest from elsewhere is nobody's knowledge."""

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        """The finder that the agent's options describe; a finder takes those that it needs and keeps `conf` not."""
        return cls()

    def learn(self, guest: str, ports: tuple[GuestPort, ...]) -> None:  # noqa: B027 - a file of ports needs not
        """What this host's hypervisor says of the guest's ports; the newest word counts, and none at all forgets it.

        Called before `find` where there is a hypervisor to ask, from any thread.
        """

    @abc.abstractmethod
    def find(self, guest: str) -> tuple[Scope, ...]:
        """The scopes of the guest's ports that are on this host now; none while they are not known yet.

        Does not block for long and may be asked again and again.

        :raises ConfigurationError: the answer cannot be read; the message says where.
        :raises NotAvailable, NotPermitted: what it is read with is missing, or this process may not use it.
        """

    @abc.abstractmethod
    def neighbours(self, scope: Scope) -> Addresses:
        """Addresses of the other ports that are on this host now and have their state in the same zone.

        :raises OperatorError: as `find`.
        """

    @abc.abstractmethod
    def namespaces(self) -> tuple[str | None, ...]:
        """The network namespaces that hold firewalls of this host's ports; None is the agent's own.

        :raises OperatorError: as `find`.
        """
