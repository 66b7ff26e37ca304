"""Which policy is a guest's."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from stevedore import driver as stevedore_driver
from stevedore.exception import NoMatches

from sami_plugin.errors import ConfigurationError, NotAvailable
from sami_plugin.model.domain import Domain
from sami_plugin.model.risk import Risk
from sami_plugin.model.verdict import Verdict
from sami_plugin.policies.base import Policy
from sami_plugin.policies.policies import Proceed

if TYPE_CHECKING:
    from oslo_config import cfg

LOG = logging.getLogger(__name__)

NAMESPACE = "sami.policies"
OFF = "off"
"""In place of a policy's name: this host does nothing for the guest's flows."""


@dataclass(frozen=True, slots=True)
class Policies:
    """The operator's choice. A guest's own comes before that of the domain that it comes from."""

    default: Policy = field(default_factory=Proceed)
    domains: Mapping[str, Policy] = field(default_factory=dict)
    guests: Mapping[str, Policy] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()
    """Guests whose flows are nobody's business."""
    excluded_flavors: frozenset[str] = frozenset()
    """So are those of guests of these."""

    def of(self, guest: str, domain: Domain | None) -> Policy:
        if guest in self.guests:
            return self.guests[guest]
        return self.default if domain is None else self.domains.get(domain.name, self.default)

    def judge(self, risk: Risk, domain: Domain | None) -> Verdict:
        """What the guest's policy says; `domain` is the source's, where it is not this host's own.

        A policy that fails lets the guest come: that is its author's fault, and neither guest nor flows pay for it.
        """
        policy = self.of(risk.guest, domain)
        try:
            verdict = policy.judge(risk)
            if not isinstance(verdict, Verdict):
                raise TypeError(f"{verdict!r} is no Verdict")
        except Exception:
            LOG.exception("guest %s: the policy %s failed, so the guest may come", risk.guest, type(policy).__name__)
            return Verdict.PROCEED
        return verdict

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts, domains: Iterable[Domain]) -> Policies:
        """The policies that the options name.

        :raises ConfigurationError: there is no such policy, or an option is wrong; says which.
        :raises NotAvailable: a policy is installed and cannot be loaded.
        """
        names = {_guest(guest): name for guest, name in conf.policy.guests.items()}
        return cls(
            _load(conf.policy.default, conf, "[policy] default"),
            {one.name: _load(one.policy, conf, f"[domain:{one.name}] policy") for one in domains if one.policy},
            {guest: _load(name, conf, "[policy] guests") for guest, name in names.items() if name != OFF},
            frozenset(guest for guest, name in names.items() if name == OFF),
            frozenset(conf.policy.excluded_flavors),
        )


def _guest(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise ConfigurationError(f"[policy] guests: {text!r} is no guest's UUID; write UUID:POLICY") from error


def _load(name: str, conf: cfg.ConfigOpts, option: str) -> Policy:
    if name == OFF:
        raise ConfigurationError(f"{option}: {OFF!r} is for single guests ([policy] guests)")

    def failed(manager: object, entry_point: metadata.EntryPoint, error: BaseException) -> None:
        raise NotAvailable(f"{option}: the policy {name!r} cannot be loaded: {error}") from error

    try:
        found: stevedore_driver.DriverManager[Any] = stevedore_driver.DriverManager(
            NAMESPACE, name, on_load_failure_callback=failed
        )
    except NoMatches as error:
        known = ", ".join(sorted({point.name for point in metadata.entry_points(group=NAMESPACE)}))
        raise ConfigurationError(f"{option}: there is no policy {name!r}; there are {known}") from error
    policy: Any = found.driver
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise ConfigurationError(f"{option}: {name!r} is no policy but {policy!r}")
    return policy.from_conf(conf)
