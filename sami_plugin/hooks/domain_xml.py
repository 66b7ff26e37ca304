"""What a guest's libvirt XML says of its ports. It may have come from another host: nothing in it is believed here.

Addresses of a port are written there in three ways, and all count. By SAMI's own metadata, set with `virsh metadata`:

    <sami:ports xmlns:sami="urn:sami:ports:1">
      <sami:port mac="52:54:00:00:00:01"><sami:address>192.0.2.7</sami:address></sami:port>
    </sami:ports>

by libvirt's filters (https://libvirt.org/formatnwfilter.html), `<filterref><parameter name='IP' value='192.0.2.7'/>`,
and by Nova's metadata, which names a port by its UUID: the tap is called "tap" and the first 11 characters of it.

Which host the guest comes from is written there by that host's agent:

    <sami-origin:origin xmlns:sami-origin="urn:sami:origin:1" host="compute-1" token="..."/>
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import uuid
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import netaddr

from sami_plugin.errors import Malformed
from sami_plugin.model.flows import Addresses
from sami_plugin.model.guest_port import GuestPort
from sami_plugin.model.migration import Origin

PORTS = "urn:sami:ports:1"
ORIGIN = "urn:sami:origin:1"
ORIGIN_PREFIX = "sami-origin"
NOVA = "http://openstack.org/xmlns/libvirt/nova/1.1"
MOST_OCTETS = 1 << 20

_DEVICE = re.compile(r"[^\s/:]{1,15}")
"""What the kernel takes for a name (dev_valid_name in net/core/dev.c)."""
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_TOKEN = re.compile(r"[0-9a-f]{64}")
_INTERFACE_ID = re.compile(r"[!-~]{1,64}")
"""A UUID everywhere that is known (https://libvirt.org/formatdomain.html), but only compared here."""
_HOST = re.compile(r"[!-~]{1,255}")
_FILTER_PARAMETERS = ("IP", "IPV6")


def ports_of(xml: str | bytes) -> tuple[GuestPort, ...]:
    """The guest's ports in the order of the XML. What is unknown in it is skipped.

    XML that is made for a migration may not name a tap: `device` is then empty.

    :raises Malformed: it is no domain XML, it is larger than 1 MiB, or what it says of a port cannot be.
    """
    domain = _domain(xml)
    by_mac = dict[str, list[netaddr.IPAddress]]()
    for number, port in enumerate(domain.iterfind(f"metadata/{{{PORTS}}}ports/{{{PORTS}}}port"), 1):
        place = f"sami:port {number}"
        addresses = [_address(one.text, place) for one in port.iterfind(f"{{{PORTS}}}address")]
        by_mac.setdefault(_mac(port.get("mac"), place), []).extend(addresses)
    by_device = dict[str, list[netaddr.IPAddress]]()
    for number, port in enumerate(domain.iterfind(f"metadata/{{{NOVA}}}instance/{{{NOVA}}}ports/{{{NOVA}}}port"), 1):
        addresses = [_address(ip.get("address"), f"nova:port {number}") for ip in port.iterfind(f"{{{NOVA}}}ip")]
        by_device.setdefault(f"tap{port.get('uuid', '')[:11]}", []).extend(addresses)
    return tuple(_ports(domain, by_mac, by_device))


def origin_of(xml: str | bytes) -> Origin | None:
    """The host that the guest runs on, or comes from, by its own word; None where it says nothing.

    :raises Malformed: as `ports_of`, or the word is none.
    """
    found = _domain(xml).find(f"metadata/{{{ORIGIN}}}origin")
    if found is None:
        return None
    host, token = found.get("host", ""), found.get("token", "")
    if not (_HOST.fullmatch(host) and _TOKEN.fullmatch(token)):
        raise Malformed(f"{host[:40]!r} and what is beside it are no host and its token", "domain XML, sami:origin")
    return Origin(host, token)


def flavor_of(xml: str | bytes) -> str:
    """The name of the flavor that Nova made the guest of; empty where it says none.

    :raises Malformed: as `ports_of`.
    """
    flavor = _domain(xml).find(f"metadata/{{{NOVA}}}instance/{{{NOVA}}}flavor")
    return "" if flavor is None else flavor.get("name", "")


def new_origin(host: str) -> str:
    """The element that says that a guest runs on this host, with a new token. libvirt adds the namespace."""
    return f"<origin host={quoteattr(host)} token={quoteattr(secrets.token_hex(32))}/>"


def guest_uuid_of(xml: str | bytes) -> str:
    """The guest's UUID in its usual form.

    :raises Malformed: as `ports_of`, or there is none.
    """
    text = _domain(xml).findtext("uuid", "").strip()
    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise Malformed(f"{text[:40]!r} is no UUID", "domain XML, uuid") from error


def _domain(xml: str | bytes) -> ElementTree.Element:
    octets = xml.encode("utf-8", "surrogatepass") if isinstance(xml, str) else xml
    if len(octets) > MOST_OCTETS:
        raise Malformed(f"{len(octets)} octets are more than the {MOST_OCTETS} of a guest's description", "domain XML")
    # Entities come with a document type. libvirt writes UTF-8 and no such thing. Expat takes UTF-16 by its first octets
    # whatever encoding it is told, so NUL is refused too: then the declaration cannot be there in other letters.
    for refused, what in ((b"<!DOCTYPE", "a document type"), (b"\0", "NUL")):
        if refused in octets:
            raise Malformed(f"{what} is not taken", f"domain XML, octet {octets.index(refused)}")
    try:
        octets.decode()
        domain = ElementTree.fromstring(octets, ElementTree.XMLParser(encoding="utf-8"))
    except (ElementTree.ParseError, ValueError) as error:
        line, column = getattr(error, "position", (1, 0))
        raise Malformed(f"no XML: {error}", f"domain XML, line {line}, column {column}") from error
    if domain.tag != "domain":
        raise Malformed(f"{domain.tag[:40]!r} is not `domain`", "domain XML, first element")
    return domain


def _ports(
    domain: ElementTree.Element,
    by_mac: dict[str, list[netaddr.IPAddress]],
    by_device: dict[str, list[netaddr.IPAddress]],
) -> Iterator[GuestPort]:
    for number, interface in enumerate(domain.iterfind("devices/interface"), 1):
        place = f"interface {number}"
        device = _attribute(interface, "target", "dev") or ""
        if device and not _DEVICE.fullmatch(device):
            raise Malformed(f"{device[:40]!r} is no name of a device", f"domain XML, {place}, target")
        told = _attribute(interface, "mac", "address")
        mac = _mac(told, place) if told is not None else ""
        filtered = [
            _address(parameter.get("value"), f"{place}, filterref")
            for parameter in interface.iterfind("filterref/parameter")
            if (parameter.get("name") or "").upper() in _FILTER_PARAMETERS
        ]
        claimed: Addresses = (*by_mac.get(mac, ()), *filtered, *by_device.get(device, ()))
        name = _attribute(interface, "virtualport/parameters", "interfaceid") or ""
        if name and not _INTERFACE_ID.fullmatch(name):
            raise Malformed(f"{name[:40]!r} is no name of a port", f"domain XML, {place}, virtualport")
        bridge = _attribute(interface, "source", "bridge")
        yield GuestPort(device, mac, bridge, tuple(dict.fromkeys(claimed)), name)


def _attribute(interface: ElementTree.Element, element: str, name: str) -> str | None:
    found = interface.find(element)
    return found.get(name) if found is not None else None


def _mac(text: str | None, place: str) -> str:
    mac = (text or "").strip().lower()
    if not _MAC.fullmatch(mac):
        raise Malformed(f"{mac[:40]!r} is no MAC address", f"domain XML, {place}")
    return mac


def _address(text: str | None, place: str) -> netaddr.IPAddress:
    # netaddr takes "10" for an address, and ipaddress takes a scope that no packet carries.
    try:
        found = ipaddress.ip_address((text or "").strip())
        if found.is_unspecified or found.is_multicast or found.is_loopback or "%" in str(found):
            raise ValueError("not of one host")
        return netaddr.IPAddress(str(found))
    except ValueError as error:
        what = f"{(text or '').strip()[:60]!r} is no address that a port can have"
        raise Malformed(what, f"domain XML, {place}") from error
