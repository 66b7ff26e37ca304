"""What an operator writes about other domains and about bounds, as plain values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import netaddr
import pytest
from oslo_config import cfg
from oslo_messaging.opts import list_opts

from sami_plugin import conf as options
from sami_plugin.errors import ConfigurationError
from sami_plugin.model.settings import Bounds, Settings

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
