"""The policies that SAMI brings along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from sami_plugin.model.risk import Risk
from sami_plugin.model.verdict import Verdict
from sami_plugin.policies.base import Policy

if TYPE_CHECKING:
    from oslo_config import cfg


class Proceed(Policy):
    """The guest moves, whatever becomes of its flows."""

    def judge(self, risk: Risk) -> Verdict:
        return Verdict.PROCEED


class Partial(Policy):
    """The guest moves if enough of its flows can be carried."""

    def __init__(self, least_percent: float = 90.0) -> None:
        self._least_percent = least_percent

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        return cls(conf.policy.partial_percent)

    def judge(self, risk: Risk) -> Verdict:
        is_enough = risk.flows is not None and risk.carried * 100 >= self._least_percent * risk.flows
        return Verdict.PROCEED if is_enough else Verdict.VETO


class Refuse(Policy):
    """The guest moves only if it is known that all its flows come along as they are."""

    def judge(self, risk: Risk) -> Verdict:
        return Verdict.PROCEED if risk.is_none else Verdict.VETO


class AskOperator(Policy):
    """Where something would be lost, an operator decides."""

    def judge(self, risk: Risk) -> Verdict:
        return Verdict.PROCEED if risk.is_none else Verdict.ASK
