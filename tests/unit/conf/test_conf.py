"""What an operator writes about other domains and about bounds, as plain values."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import netaddr
import pytest
from oslo_config import cfg
from oslo_messaging.opts import list_opts

from sami_plugin import conf as options
from sami_plugin.drivers import loader
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.errors import ConfigurationError
from sami_plugin.model import information_elements
from sami_plugin.model.settings import Bounds, Settings
from sami_plugin.model.verdict import Verdict
from sami_plugin.policies.chosen import Policies

WEST = """
[agent]
host = compute-1.east.example
domains = west
[domain:west]
hosts = *.west.example, gateway
transport_url = rabbit://u:p@192.0.2.1/
authorities = /etc/sami/tls/west.pem
address_map = 10.1.0.0/24=10.9.0.0/24, 2001:db8:1::/48=2001:db8:9::/48
peers_follow = true
kinds_in = tcp-*
"""

Read = Callable[[str], cfg.ConfigOpts]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def of(text: str) -> cfg.ConfigOpts:
        file = tmp_path / "agent.conf"
        file.write_text(text)
        conf = cfg.ConfigOpts()
        options.register(conf)
        conf(args=[], default_config_files=[str(file)], default_config_dirs=[])
        return conf

    return of


def test_translations_are_addresses(read: Read) -> None:
    made = options.settings(read("[agent]\ntranslations = 203.0.113.7, 2001:db8:f::7\n"))
    assert list(map(str, made.translations)) == ["203.0.113.7", "2001:db8:f::7"]
    assert options.settings(read("")).translations == ()
    with pytest.raises(cfg.ConfigFileValueError, match=r"203\.0\.113\.0/24 is not IPv4 or IPv6"):
        options.settings(read("[agent]\ntranslations = 203.0.113.0/24\n"))


def test_domain_is_read_whole(read: Read) -> None:
    (west,) = options.domains(read(WEST))
    assert (west.name, west.transport_url, west.peers_follow) == ("west", "rabbit://u:p@192.0.2.1/", True)
    assert [west.has(host) for host in ("a.west.example", "gateway", "a.east.example", "west.example")] == [
        True,
        True,
        False,
        False,
    ]
    assert west.credentials.authorities == Path("/etc/sami/tls/west.pem")
    assert west.credentials.certificate == Path("/etc/sami/tls/host.pem")
    assert west.credentials.revoked is None
    assert west.address_map.pairs[1][1] == netaddr.IPNetwork("2001:db8:9::/48")
    assert (west.takes("tcp-ipv6"), west.takes("udp-ipv4"), west.gives("udp-ipv4")) == (True, False, True)


def test_without_domains_there_are_none(read: Read) -> None:
    assert options.domains(read("")) == ()


@pytest.mark.parametrize(
    ("line", "instead", "said"),
    [
        ("authorities = /etc/sami/tls/west.pem", "", r"\[domain:west\] authorities: has to be set"),
        ("hosts = *.west.example, gateway", "", r"\[domain:west\] hosts: has to be set"),
        ("hosts = *.west.example", "hosts = *.example", r"has this host, compute-1.east.example, itself"),
        ("10.9.0.0/24", "10.9.0.0/25", r"\[domain:west\] address_map: .*equally long"),
    ],
)
def test_what_does_not_do_is_named(read: Read, line: str, instead: str, said: str) -> None:
    assert line in WEST
    with pytest.raises(ConfigurationError, match=said):
        options.domains(read(WEST.replace(line, instead)))


def test_domain_without_a_group_is_named(read: Read) -> None:
    with pytest.raises(ConfigurationError, match=r"\[domain:north\] hosts: has to be set"):
        options.domains(read("[agent]\ndomains = north\n"))


def test_bounds_are_read(read: Read) -> None:
    found = options.settings(read("[bounds]\nsessions = 7\nhook_seconds = 2.5\n")).bounds
    assert found == Bounds(sessions=7, hook_seconds=2.5)


def test_defaults_are_those_of_the_plain_values(read: Read) -> None:
    assert options.settings(read("")) == Settings()


def test_options_of_notifications_are_told_as_oslo_messaging_has_them() -> None:
    (group,) = (found for name, found in list_opts() if name == options.NOTIFICATIONS.name)
    theirs = {option.dest: option for option in group}
    assert [type(theirs[ours.dest]) for ours in options.NOTIFICATION_OPTIONS] == [
        type(ours) for ours in options.NOTIFICATION_OPTIONS
    ]
    for ours in options.NOTIFICATION_OPTIONS:
        assert (ours.default, ours.secret) == (theirs[ours.dest].default, theirs[ours.dest].secret)


def test_policy_s_limits_are_read(read: Read) -> None:
    policy = "[policy]\nask_seconds = 7.5\nsilence_means = veto\n"
    limits = options.settings(read(f"{policy}[migration]\nverdict_seconds = 3\nreservation_seconds = 9\n")).limits
    assert (limits.ask_seconds, limits.silence_means) == (7.5, Verdict.VETO)
    assert (limits.verdict_seconds, limits.reservation_seconds) == (3, 9)


def test_domain_has_a_policy_or_none(read: Read) -> None:
    assert options.domains(read(WEST))[0].policy == ""
    assert options.domains(read(f"{WEST}policy = ask\n"))[0].policy == "ask"


def test_capacity_is_the_driver_s_only_where_it_is_said(read: Read) -> None:
    assert "capacity" not in options.driver_options(read(""))["linux_conntrack"]
    assert options.driver_options(read("[agent]\ncapacity = 1000\n"))["linux_conntrack"]["capacity"] == 1000


def test_counters_are_told_only_where_it_is_said(read: Read) -> None:
    assert options.driver_options(read("")) == {"linux_conntrack": {"accounting": False}}
    text = "[linux_conntrack]\naccounting = true\n"
    assert options.driver_options(read(text)) == {"linux_conntrack": {"accounting": True}}
    assert options.driver_options(read(f"{text}[agent]\ndriver = acme\n")) == {"acme": {}}


def test_further_drivers_have_options_of_their_own(read: Read) -> None:
    agent = "[agent]\ncapacity = 9\nfurther_drivers = nft_sets, pcp, acme, deposit\n"
    pcp = "[pcp]\nserver = 192.0.2.1\nlease_files = /a, /b6\n"
    text = f"{agent}[nft_sets]\nsets = inet filter one, two=ip a b\n{pcp}"
    found = options.driver_options(read(text))
    assert list(found) == ["linux_conntrack", "nft_sets", "pcp", "acme", "deposit"]
    assert found["nft_sets"] == {"sets": ["inet filter one", "two=ip a b"]}
    assert found["pcp"] == {"server": "192.0.2.1", "lease_files": ["/a", "/b6"], "device": None}
    assert found["deposit"] == {"folder": "/var/lib/sami/deposit", "days": 30}
    assert found["acme"] == {}


def test_driver_that_is_named_twice_is_told(read: Read) -> None:
    with pytest.raises(ConfigurationError, match="further_drivers: one of linux_conntrack, linux_conntrack"):
        options.driver_options(read("[agent]\nfurther_drivers = linux_conntrack\n"))


class Boundless(MemoryDriver):
    """A driver that has no such option."""

    def __init__(self) -> None:
        super().__init__(MemoryDevice())


def test_capacity_of_a_driver_that_takes_none_is_told_by_its_name(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        driver = Boundless

    monkeypatch.setattr(loader.stevedore_driver, "DriverManager", lambda *arguments, **more: Found)
    with pytest.raises(ConfigurationError, match=r"the driver .memory. does not take these options: .*capacity"):
        loader.load_drivers(options.driver_options(read("[agent]\ndriver = memory\ncapacity = 7\n")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[policy]\nsilence_means = ask\n", "silence_means"),
        ("[policy]\nask_seconds = 551\n", "ask_seconds"),
        ("[policy]\ndefault = partial\npartial_percent = 101\n", "partial_percent"),
        ("[policy]\nguests = veto\n", "guests"),
        ("[agent]\ncapacity = 0\n", "capacity"),
        ("[migration]\nverdict_seconds = -1\n", "verdict_seconds"),
        ("[migration]\nverdict_seconds = inf\n", "verdict_seconds.*inf will not do; write a number of at most"),
        ("[migration]\nsession_seconds = 1e10\n", "session_seconds.*1e[+]10 will not do"),
        ("[policy]\nask_seconds = nan\n", "ask_seconds.*nan will not do"),
        ("[agent]\nenterprise_number = 29305\n", r"\[agent\] enterprise_number: 29305 cannot be the enterprise number"),
    ],
)
def test_value_that_is_none_is_refused_by_option(read: Read, text: str, said: str) -> None:
    conf = read(text)
    with pytest.raises((cfg.Error, ConfigurationError, ValueError), match=said):
        options.settings(conf), options.driver_options(conf), Policies.from_conf(conf, ())


def test_every_number_with_a_fraction_has_to_be_one_that_can_be_worked_with(read: Read) -> None:
    found = [
        (group.name, one.dest)
        for group, all_of in options.list_opts()
        for one in all_of
        if isinstance(one, cfg.FloatOpt)
    ]
    assert len(found) > 15
    for group, name in found:
        for value in ("nan", "inf"):
            conf = read(f"[{group}]\n{name} = {value}\n")
            with pytest.raises(cfg.ConfigFileValueError, match=name):
                conf[group][name]


def test_enterprise_number_of_an_installed_vendor_is_refused_by_option(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in ("ELEMENTS", "_BY_NUMBER", "_VENDORS"):
        monkeypatch.setattr(information_elements, known, copy.copy(getattr(information_elements, known)))
    ours, vendor = information_elements.ELEMENTS["zoneRole"], information_elements.Origin.VENDOR
    information_elements.bring([dataclasses.replace(ours, name="lease", origin=vendor, vendor=4711)])
    with pytest.raises(ConfigurationError, match=r"\[agent\] enterprise_number: 4711 .* an installed package brings"):
        options.settings(read("[agent]\nenterprise_number = 4711\n"))
    assert options.settings(read("[agent]\nenterprise_number = 4712\n")).enterprise == 4712
