"""What is read of the floating IPs in a distributed router's rules."""

from __future__ import annotations

import netaddr
import pytest

from sami_plugin.model.flows import Addresses
from sami_plugin.scopes.neutron_dvr import floating_ips_of

# As iptables-save writes what Neutron's L3 agent sets, shortened to what is about addresses.
RULES = """\
*nat
:PREROUTING ACCEPT [0:0]
:neutron-l3-agent-float-snat - [0:0]
-A PREROUTING -j neutron-l3-agent-PREROUTING
-A POSTROUTING -j neutron-l3-agent-POSTROUTING
-A neutron-l3-agent-OUTPUT -d 198.51.100.9/32 -j DNAT --to-destination 192.0.2.9
-A neutron-l3-agent-POSTROUTING ! -o rfp-1234abcd-5 -m conntrack ! --ctstate DNAT -j ACCEPT
-A neutron-l3-agent-PREROUTING -d 169.254.169.254/32 -i qr-+ -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 9697
-A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -i rfp-1234abcd-5 -j DNAT --to-destination 192.0.2.7
-A neutron-l3-agent-float-snat -s 192.0.2.7/32 -j SNAT --to-source 198.51.100.7 --random-fully
-A neutron-l3-agent-PREROUTING -d 198.51.100.8/32 -i rfp-1234abcd-5 -j DNAT --to-destination 192.0.2.8
-A neutron-l3-agent-float-snat -s 192.0.2.8/32 -j SNAT --to-source 198.51.100.8
-A neutron-l3-agent-PREROUTING -d 198.51.100.6/32 -j DNAT --to-destination 192.0.2.6
-A neutron-l3-agent-float-snat -s 192.0.2.6/32 -j SNAT --to-source 198.51.100.6 --random-fully
COMMIT
"""


def addresses(*texts: str) -> Addresses:
    return tuple(map(netaddr.IPAddress, texts))


def test_floating_ips_are_told_by_the_ports_own_address() -> None:
    (seven, eight) = addresses("192.0.2.7", "192.0.2.8")
    assert floating_ips_of(RULES) == {seven: addresses("198.51.100.7"), eight: addresses("198.51.100.8")}


@pytest.mark.parametrize(
    "rule",
    [
        "-A neutron-l3-agent-PREROUTING -d 198.51.100.0/24 -i rfp-1 -j DNAT --to-destination 192.0.2.7",
        "-A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -i rfp-1 -p tcp -j DNAT --to-destination 192.0.2.7",
        "-A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -i rfp-1 -j DNAT --to-destination 192.0.2.7:80",
        "-A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -i qg-1 -j DNAT --to-destination 192.0.2.7",
        "-A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -j DNAT --to-destination 192.0.2.7",
        "-A neutron-l3-agent-PREROUTING ! -d 198.51.100.7/32 -i rfp-1 -j DNAT --to-destination 192.0.2.7",
        "-A neutron-l3-agent-PREROUTING -d 198.51.100.7/32 -i rfp-1 -j DNAT --to-destination 0.0.0.0",
        "-A neutron-l3-agent-PREROUTING",
        "",
    ],
)
def test_other_rule_says_no_floating_ip(rule: str) -> None:
    assert floating_ips_of(rule) == {}
