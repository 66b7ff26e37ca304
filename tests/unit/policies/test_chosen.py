"""Which policy is a guest's, and what each says."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg

from sami_plugin import conf as options
from sami_plugin.errors import ConfigurationError, NotAvailable
from sami_plugin.model.domain import Domain
from sami_plugin.model.risk import Risk
from sami_plugin.model.verdict import Verdict
from sami_plugin.policies import chosen
from sami_plugin.policies.base import Policy
from sami_plugin.policies.chosen import Policies
from sami_plugin.policies.policies import AskOperator, Partial, Proceed, Refuse
from tests.unit.installed import install_broken

GUEST, OTHER = "6ac30000-0000-4000-8000-000000000001", "6bd40000-0000-4000-8000-000000000002"
DOMAINS = "[agent]\nhost = compute-1\ndomains = west, north\n" + "".join(
    f"[domain:{name}]\nhosts = *.{name}.example\nauthorities = /etc/sami/tls/{name}.pem\n" for name in ("north", "west")
)

Read = Callable[[str], tuple[Policies, dict[str, Domain]]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def of(text: str) -> tuple[Policies, dict[str, Domain]]:
        file = tmp_path / "agent.conf"
        file.write_text(text)
        conf = cfg.ConfigOpts()
        options.register(conf)
        conf(args=[], default_config_files=[str(file)], default_config_dirs=[])
        domains = options.domains(conf)
        return Policies.from_conf(conf, domains), {domain.name: domain for domain in domains}

    return of


def test_without_a_word_of_the_operator_every_guest_may_come(read: Read) -> None:
    policies, domains = read(DOMAINS)
    assert isinstance(policies.of(GUEST, None), Proceed)
    assert isinstance(policies.of(GUEST, domains["west"]), Proceed)
    assert policies.excluded == frozenset()


def test_guest_s_own_policy_comes_before_its_domain_s_and_that_before_the_default(read: Read) -> None:
    policies, domains = read(
        f"{DOMAINS}policy = ask\n[policy]\ndefault = veto\nguests = {GUEST.upper()}:partial\npartial_percent = 75\n"
    )
    west, north = domains["west"], domains["north"]
    assert [type(policies.of(OTHER, domain)) for domain in (None, north, west)] == [Refuse, Refuse, AskOperator]
    assert [type(policies.of(GUEST, domain)) for domain in (None, north, west)] == [Partial, Partial, Partial]
    assert policies.of(GUEST, None).judge(RISK) is Verdict.PROCEED
    assert policies.of(GUEST, None).judge(replace(RISK, carried=2)) is Verdict.VETO


def test_guest_that_is_off_has_no_policy_and_is_excluded(read: Read) -> None:
    policies, _ = read(f"[policy]\nguests = {GUEST}:off, {OTHER}:veto\n")
    assert policies.excluded == {GUEST}
    assert list(policies.guests) == [OTHER]


def test_flavors_are_excluded_by_name(read: Read) -> None:
    assert read("")[0].excluded_flavors == frozenset()
    assert read("[policy]\nexcluded_flavors = m1.tiny, m1.small\n")[0].excluded_flavors == {"m1.tiny", "m1.small"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[policy]\ndefault = maybe\n",
            r"\[policy\] default: there is no policy 'maybe'; there are ask, partial, proceed, ",
        ),
        (f"[policy]\nguests = {GUEST}:maybe\n", r"\[policy\] guests: there is no policy 'maybe'"),
        ("[policy]\nguests = web:veto\n", r"\[policy\] guests: 'web' is no guest's UUID; write UUID:POLICY"),
        (f"{DOMAINS}policy = maybe\n", r"\[domain:west\] policy: there is no policy 'maybe'"),
        ("[policy]\ndefault = off\n", r"\[policy\] default: 'off' is for single guests \(\[policy\] guests\)"),
        (f"{DOMAINS}policy = off\n", r"\[domain:west\] policy: 'off' is for single guests"),
    ],
)
def test_what_is_no_policy_is_told_with_its_option_and_what_to_write(read: Read, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{said}"):
        read(text)


def test_plugin_that_is_no_policy_is_named(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        driver = dict

    monkeypatch.setattr(chosen.stevedore_driver, "DriverManager", lambda namespace, name, **more: Found)
    with pytest.raises(ConfigurationError, match=r"^\[policy\] default: 'proceed' is no policy but <class 'dict'>"):
        read("")


RISK = Risk(GUEST, "host-a", "host-b", 4, carried=3, losses={"no place": 1})
NONE = replace(RISK, carried=4, losses={})
DEGRADED = replace(NONE, degraded={"no marks": 4})
UNKNOWN = Risk(GUEST, "host-a", "host-b", None, why_unknown="nobody said")
NO_FLOWS = replace(NONE, flows=0, carried=0)
PROCEED, VETO, ASK = Verdict.PROCEED, Verdict.VETO, Verdict.ASK


@pytest.mark.parametrize(
    ("policy", "verdicts"),
    [
        (Proceed(), [PROCEED, PROCEED, PROCEED, PROCEED, PROCEED]),
        (Partial(75), [PROCEED, PROCEED, PROCEED, VETO, PROCEED]),
        (Partial(75.1), [PROCEED, PROCEED, VETO, VETO, PROCEED]),
        (Partial(100), [PROCEED, PROCEED, VETO, VETO, PROCEED]),
        (Partial(0), [PROCEED, PROCEED, PROCEED, VETO, PROCEED]),
        (Refuse(), [PROCEED, VETO, VETO, VETO, PROCEED]),
        (AskOperator(), [PROCEED, ASK, ASK, ASK, PROCEED]),
    ],
    ids=lambda one: f"{type(one).__name__}{getattr(one, '_least_percent', '')}" if isinstance(one, Policy) else "",
)
def test_verdict_on_no_risk_a_degraded_one_a_loss_an_unknown_one_and_no_flows(policy: Any, verdicts: list[Any]) -> None:
    assert [policy.judge(risk) for risk in (NONE, DEGRADED, RISK, UNKNOWN, NO_FLOWS)] == verdicts


def test_policy_of_the_user_guide_works() -> None:
    page = (Path(__file__).parents[3] / "doc/source/user/policies.rst").read_text()
    _, _, begin = page.partition(".. code-block:: python\n")
    code, _, _ = begin.partition("\nand an entry point")
    defined: dict[str, Any] = {}
    exec(textwrap.dedent(code), defined)  # noqa: S102, it is ours
    policy: Policy = defined["FewLosses"]()
    assert [policy.judge(risk) for risk in (NONE, RISK, UNKNOWN)] == [PROCEED, PROCEED, ASK]
    assert policy.judge(replace(RISK, losses={"no place": 11})) is ASK


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("[policy]\ndefault = broken\n", "[policy] default"),
        (f"[policy]\nguests = {GUEST}:broken\n", "[policy] guests"),
        (f"{DOMAINS}policy = broken\n", "[domain:west] policy"),
    ],
)
def test_policy_that_cannot_be_imported_says_why(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, option: str
) -> None:
    install_broken(tmp_path, monkeypatch, chosen.NAMESPACE)
    with pytest.raises(NotAvailable, match=r"the policy 'broken' cannot be loaded: .*none_such") as caught:
        read(text)
    assert str(caught.value).startswith(f"{option}: ")
