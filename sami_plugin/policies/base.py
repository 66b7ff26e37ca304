"""The contract of policies (stevedore namespace `sami.policies`)."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Self

from sami_plugin.model.risk import Risk
from sami_plugin.model.verdict import Verdict

if TYPE_CHECKING:
    from oslo_config import cfg


class Policy(abc.ABC):
    """Asked once for each migration to this host, before memory is copied. Only then can it be refused."""

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        """The policy that the agent's options describe; it takes those that it needs and keeps `conf` not."""
        return cls()

    @abc.abstractmethod
    def judge(self, risk: Risk) -> Verdict:
        """What to do about it. Called from any thread, and does not block: the migration waits for it.

        Where nobody knows what would be lost (the source's agent does not answer), `risk.flows` is None.
        """
