"""A guest's description: what is read of its ports, and what is refused."""

from __future__ import annotations

import contextlib

import netaddr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sami_plugin.errors import Malformed
from sami_plugin.hooks.domain_xml import MOST_OCTETS, ORIGIN, flavor_of, guest_uuid_of, new_origin, origin_of, ports_of
from sami_plugin.model.guest_port import GuestPort

UUID = "6ac3c1c0-0000-4000-8000-000000000001"
PORT_UUID = "1234abcd-5e6f-4000-8000-000000000002"

NOVA = f"""
    <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
      <nova:package version="26.3.0"/><nova:name>web</nova:name><nova:flavor name="m1.small"/>
      <nova:ports>
        <nova:port uuid="{PORT_UUID}">
          <nova:ip type="fixed" address="192.0.2.7" ipVersion="4"/>
          <nova:ip type="fixed" address="2001:db8::7" ipVersion="6"/>
        </nova:port>
        <nova:port uuid="ffffffff-5e6f-4000-8000-000000000002"><nova:ip address="192.0.2.9"/></nova:port>
      </nova:ports>
    </nova:instance>"""

# As `virsh metadata DOMAIN urn:sami:ports:1 --key sami --set ...` leaves it in the XML (libvirt 9.0.0).
SAMI = """
    <sami:ports xmlns:sami="urn:sami:ports:1">
      <sami:port mac="52:54:00:00:00:01">
        <sami:address>192.0.2.7</sami:address>
        <sami:address>2001:db8::7</sami:address>
      </sami:port>
    </sami:ports>"""


def domain(interfaces: str = "", metadata: str = "") -> str:
    return (
        f"<domain type='kvm' id='3'>\n <name>web</name><uuid>{UUID.upper()}</uuid>\n <metadata>{metadata}</metadata>\n"
        f" <devices><disk type='file'><target dev='vda'/></disk>{interfaces}</devices></domain>"
    )


def interface(inside: str = "", target: str = "<target dev='tap-g'/>") -> str:
    return (
        "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/>"
        f"{target}<model type='virtio'/>{inside}</interface>"
    )


def addresses(*texts: str) -> tuple[netaddr.IPAddress, ...]:
    return tuple(map(netaddr.IPAddress, texts))


def test_port_without_any_address() -> None:
    assert ports_of(domain(interface())) == (GuestPort("tap-g", "52:54:00:00:00:01", "br0"),)


def test_text_and_octets_say_the_same() -> None:
    text = domain(interface(), SAMI)
    assert ports_of(text) == ports_of(text.encode())
    assert guest_uuid_of(text) == guest_uuid_of(text.encode()) == UUID


def test_addresses_by_our_metadata_go_by_mac() -> None:
    other = interface().replace("00:01", "00:02").replace("tap-g", "tap-h")
    first, second = ports_of(domain(interface() + other, SAMI))
    assert first.claimed == addresses("192.0.2.7", "2001:db8::7")
    assert second == GuestPort("tap-h", "52:54:00:00:00:02", "br0", ())


def test_mac_may_be_written_in_capitals() -> None:
    text = domain(interface().replace("52:54", "AA:BB"), SAMI.replace("52:54", "aA:bB"))
    assert ports_of(text)[0].claimed == addresses("192.0.2.7", "2001:db8::7")
    assert ports_of(text)[0].mac == "aa:bb:00:00:00:01"


def test_addresses_by_filters_and_how_they_are_learned_is_none() -> None:
    parameters = "".join(
        f"<parameter name='{name}' value='{value}'/>"
        for name, value in [
            ("CTRL_IP_LEARNING", "dhcp"),
            ("IP", "192.0.2.7"),
            ("IP", "192.0.2.8"),
            ("IPV6", "2001:db8::7"),
            ("DHCPSERVER", "192.0.2.1"),
        ]
    )
    (port,) = ports_of(domain(interface(f"<filterref filter='clean-traffic'>{parameters}</filterref>")))
    assert port.claimed == addresses("192.0.2.7", "192.0.2.8", "2001:db8::7")


def test_addresses_by_nova_go_by_the_name_of_the_tap() -> None:
    ours = interface(target=f"<target dev='tap{PORT_UUID[:11]}'/>")
    first, second = ports_of(domain(ours + interface(), NOVA))
    assert first.claimed == addresses("192.0.2.7", "2001:db8::7")
    assert second.claimed == ()


def test_flavor_is_the_one_that_nova_names() -> None:
    assert flavor_of(domain("", NOVA)) == "m1.small"
    assert flavor_of(domain()) == ""


def test_same_address_said_twice_counts_once() -> None:
    ours = interface("<filterref><parameter name='IP' value='192.0.2.7'/></filterref>")
    assert ports_of(domain(ours, SAMI))[0].claimed == addresses("192.0.2.7", "2001:db8::7")


def test_port_without_a_tap_is_kept_with_what_is_known() -> None:
    (port,) = ports_of(domain(interface(target=""), SAMI))
    assert port == GuestPort("", "52:54:00:00:00:01", "br0", addresses("192.0.2.7", "2001:db8::7"))


def test_other_interfaces_are_ports_too() -> None:
    ports = ports_of(domain("<interface type='hostdev'/><interface type='network'><source network='n'/></interface>"))
    assert ports == (GuestPort(""), GuestPort(""))


def test_name_of_the_port_in_open_vswitch() -> None:
    inside = f"<virtualport type='openvswitch'><parameters interfaceid='{PORT_UUID}'/></virtualport>"
    assert ports_of(domain(interface(inside)))[0].interface_id == PORT_UUID


@pytest.mark.parametrize("name", ["a b", "x" * 65, "\u00e9"])
def test_name_that_no_port_has_is_refused(name: str) -> None:
    inside = f"<virtualport type='openvswitch'><parameters interfaceid='{name}'/></virtualport>"
    with pytest.raises(Malformed, match="interface 1, virtualport"):
        ports_of(domain(interface(inside)))


def test_metadata_of_others_is_skipped() -> None:
    others = "<x:ports xmlns:x='urn:other'><x:port mac='nonsense'/></x:ports><ports><port mac='nonsense'/></ports>"
    newer = SAMI.replace("<sami:address>", "<sami:label/><sami:address preferred='yes'>")
    assert ports_of(domain(interface(), others + newer))[0].claimed == addresses("192.0.2.7", "2001:db8::7")


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE domain [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    "<domain><uuid>&b;</uuid></domain>"
)


@pytest.mark.parametrize(
    ("xml", "said"),
    [
        (BOMB, "a document type is not taken .at domain XML, octet 21"),
        ("", "no XML: .* .at domain XML, line 1, column 0"),
        ("<domain>\n<a></domain>", "line 2, column"),
        ("<domain>\0</domain>", "NUL is not taken"),
        ("<domain>&name;</domain>", "no XML"),
        (b"<domain>\xff</domain>", "no XML"),
        (b'<?xml version="1.0" encoding="latin-1"?><domain>\xe9</domain>', "no XML"),
        (domain().encode("utf-16"), "NUL is not taken"),
        (BOMB.encode("utf-16-le"), "NUL is not taken"),
        (BOMB.encode("utf-16-be"), "NUL is not taken"),
        ("<network/>", "'network' is not `domain`"),
        ("<domain>" + " " * MOST_OCTETS + "</domain>", "octets are more than"),
        (domain(interface(target="<target dev='a/b'/>")), "'a/b' is no name of a device .at domain XML, interface 1"),
        (domain(interface(target="<target dev='tap-0123456789ab'/>")), "is no name of a device"),
        (domain(interface().replace("52:54", "5254")), "is no MAC address .at domain XML, interface 1"),
        (domain("", SAMI.replace("52:54", "")), "is no MAC address .at domain XML, sami:port 1"),
        (domain("", SAMI.replace("192.0.2.7", "192.0.2.0/24")), "'192.0.2.0/24' is no address .*sami:port 1"),
        (domain("", SAMI.replace("192.0.2.7", "10")), "'10' is no address"),
        (domain("", SAMI.replace("192.0.2.7", "")), "'' is no address"),
        (domain("", SAMI.replace("192.0.2.7", "0.0.0.0")), "is no address that a port can have"),
        (domain("", SAMI.replace("2001:db8::7", "ff02::1")), "is no address that a port can have"),
        (domain("", SAMI.replace("2001:db8::7", "fe80::1%eth0")), "is no address that a port can have"),
        (domain("", NOVA.replace('"192.0.2.7"', '"me"')), "'me' is no address .*nova:port 1"),
        (domain(interface("<filterref><parameter name='IP'/></filterref>")), "interface 1, filterref"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_says_where(xml: str | bytes, said: str) -> None:
    with pytest.raises(Malformed, match=said):
        ports_of(xml)


def test_declared_encoding_is_not_believed() -> None:
    hidden = b'<?xml version="1.0" encoding="cp500"?>' + BOMB[21:].encode("cp500")
    with pytest.raises(Malformed):
        ports_of(hidden)


@pytest.mark.parametrize("xml", [domain().replace(UUID.upper(), "web"), "<domain/>"])
def test_guest_without_uuid_is_refused(xml: str) -> None:
    with pytest.raises(Malformed, match=r"is no UUID .at domain XML, uuid"):
        guest_uuid_of(xml)


def test_deep_description_is_read_or_refused() -> None:
    depth = MOST_OCTETS // 8
    assert ports_of(f"<domain>{'<a>' * depth}{'</a>' * depth}</domain>") == ()


PIECES = st.sampled_from(
    ["<domain>", "</domain>", "<interface>", "\0", "&a;", "'", "<![CDATA[", "<!DOCTYPE x", "\ud800"]
)


@given(st.lists(PIECES | st.text(max_size=8)).map("".join), st.integers(0, 2000))
def test_any_text_is_read_or_refused(noise: str, cut: int) -> None:
    whole = domain(interface(), SAMI + NOVA)
    for xml in (noise, whole[:cut] + noise + whole[cut:], whole[:cut]):
        for read in (ports_of, guest_uuid_of):
            with contextlib.suppress(Malformed):
                read(xml)


@given(st.binary())
def test_any_octets_are_read_or_refused(octets: bytes) -> None:
    with contextlib.suppress(Malformed):
        ports_of(octets)


def origin_with(attributes: str) -> str:
    return domain(metadata=f"<o:origin xmlns:o='{ORIGIN}' {attributes}/>")


def test_origin_is_what_the_host_has_written() -> None:
    written = new_origin("compute-1").replace("<origin", f"<s:origin xmlns:s='{ORIGIN}'")
    found = origin_of(domain(metadata=SAMI + written))
    assert found is not None
    assert found.host == "compute-1"
    assert found.token in written
    assert new_origin("compute-1") != new_origin("compute-1")
    assert origin_of(domain(metadata=SAMI)) is None


@pytest.mark.parametrize(
    "attributes",
    [
        "",
        f"host='a' token='{'0' * 63}'",
        f"host='a' token='{'A' * 64}'",
        f"host='' token='{'0' * 64}'",
        f"host='a b' token='{'0' * 64}'",
        f"host='{'a' * 256}' token='{'0' * 64}'",
        f"host='a&#10;' token='{'0' * 64}'",
        f"token='{'0' * 64}'",
    ],
)
def test_origin_that_cannot_be_is_refused(attributes: str) -> None:
    with pytest.raises(Malformed, match="sami:origin"):
        origin_of(origin_with(attributes))
