"""What is in the cloud: catalogue, image, flavor, networks, security group, anchors. Every step may be repeated."""

from __future__ import annotations

from typing import Any, NamedTuple

from lab.libvirt import parts
from lab.libvirt.guest import KERNEL_WORDS
from lab.openstack import addresses
from lab.openstack.api import Cloud
from lab.openstack.settings import KINDS, PASSWORD, REGION, URLS

IMAGE = "guest"
FLAVOR = "small"
MEMORY_MIB = 128
CONTROL_PORT = 2323
CONTROL_GROUP = "control"
"""Lets the lab into a guest's shell, and nothing else: all else reaches a guest because conntrack knows it."""
DISK_OCTETS = 1 << 20


class Anchor(NamedTuple):
    """A port without a guest, to be plugged into the host for good.

    Neutron's agent takes a bridge away with its last port, and forgets the conntrack zone of the network.
    """

    host: str
    network: str
    tap: str
    mac: str


def register(cloud: Cloud) -> None:
    """Users, services and endpoints; takes keystone alone."""
    project = cloud.ensure("identity", "/projects", "projects", "project", {"name": "service", "domain_id": "default"})
    roles = {role["name"]: role["id"] for role in cloud.get("identity", "/roles")["roles"]}
    for name, kind in KINDS.items():
        body = {"name": name, "password": PASSWORD, "domain_id": "default"}
        user = cloud.ensure("identity", "/users", "users", "user", body)
        for role in ("admin", "service"):
            if role in roles:
                path = f"/projects/{project['id']}/users/{user['id']}/roles/{roles[role]}"
                cloud.call("identity", "PUT", path)
        if cloud.find("identity", "/services", "services", name) is None:
            service = cloud.post("identity", "/services", {"service": {"name": name, "type": kind}})["service"]
            for interface in ("public", "internal", "admin"):
                endpoint = {"service_id": service["id"], "interface": interface, "region_id": REGION, "url": URLS[kind]}
                cloud.post("identity", "/endpoints", {"endpoint": endpoint})


def fill(cloud: Cloud) -> None:
    """All that a guest needs."""
    # With aki and ari, their proper names, a guest boots and its migration fails: Nova's inspector at the destination.
    kernel = image(cloud, "guest-kernel", parts.kernel_image().read_bytes())
    ramdisk = image(cloud, "guest-ramdisk", parts.INITRAMFS.read_bytes())
    words = f"{KERNEL_WORDS} lab.name=guest lab.by-mac={addresses.PREFIX} lab.control={CONTROL_PORT}"
    image(cloud, IMAGE, bytes(DISK_OCTETS), kernel_id=kernel, ramdisk_id=ramdisk, os_command_line=words)
    flavor = {"name": FLAVOR, "id": FLAVOR, "ram": MEMORY_MIB, "vcpus": 1, "disk": 0}
    cloud.ensure("compute", "/flavors", "flavors", "flavor", flavor)
    for name, number in addresses.NETWORKS.items():
        provider = {
            "provider:network_type": "flat",
            "provider:physical_network": addresses.provider(number),
        }
        network = cloud.ensure(
            "network", "/networks", "networks", "network", {"name": name, "shared": True, **provider}
        )
        subnet = {
            "name": name,
            "network_id": network["id"],
            "ip_version": 4,
            "enable_dhcp": False,  # addresses follow from hardware addresses
            "cidr": addresses.cidr(number),
            "gateway_ip": addresses.outside(number),
        }
        cloud.ensure("network", "/subnets", "subnets", "subnet", subnet)
    group = cloud.ensure("network", "/security-groups", "security_groups", "security_group", {"name": CONTROL_GROUP})
    if not any(rule["direction"] == "ingress" for rule in group["security_group_rules"]):
        admit(cloud, group["id"], CONTROL_PORT)


def admit(cloud: Cloud, group: str, port: int) -> str:
    """Let TCP in to this port of all members of a group; the rule's id."""
    rule = {
        "security_group_id": group,
        "direction": "ingress",
        "ethertype": "IPv4",
        "protocol": "tcp",
        "port_range_min": port,
        "port_range_max": port,
    }
    made: str = cloud.post("network", "/security-group-rules", {"security_group_rule": rule})["security_group_rule"][
        "id"
    ]
    return made


def image(cloud: Cloud, name: str, octets: bytes, **properties: str) -> str:
    """The id of the image that is called so, made of the octets if there is none."""
    found = cloud.find("image", "/images", "images", name)
    if found is None:
        body = {"name": name, "visibility": "public", "disk_format": "raw", "container_format": "bare", **properties}
        found = cloud.post("image", "/images", body)
    if found["status"] != "active":
        cloud.call("image", "PUT", f"/images/{found['id']}/file", octets=octets)
    known: str = found["id"]
    return known


def anchors(cloud: Cloud) -> list[Anchor]:
    """One for each network and host."""
    made = []
    for name, number in addresses.NETWORKS.items():
        for index, host in enumerate(addresses.COMPUTES):
            address = addresses.FIRST_ANCHOR_HOST + index
            owner = {"device_owner": "compute:anchor", "device_id": f"anchor-{host}", "binding:host_id": host}
            port = cloud.find("network", "/ports", "ports", f"anchor-{name}-{host}") or make_port(
                cloud, f"anchor-{name}-{host}", name, address, **owner
            )
            made.append(Anchor(host, name, tap(port), addresses.mac(number, address)))
    return made


def make_port(cloud: Cloud, name: str, network: str, host: int, **more: Any) -> Any:
    """A port in a network with the address of that number, in the group CONTROL_GROUP."""
    number = addresses.NETWORKS[network]
    body = {
        "name": name,
        "network_id": cloud.find("network", "/networks", "networks", network)["id"],
        "mac_address": addresses.mac(number, host),
        "fixed_ips": [{"ip_address": addresses.address(number, host)}],
        "security_groups": [cloud.find("network", "/security-groups", "security_groups", CONTROL_GROUP)["id"]],
        **more,
    }
    return cloud.post("network", "/ports", {"port": body})["port"]


def tap(port: Any) -> str:
    """The name of a port's link, on every host."""
    name: str = "tap" + port["id"][:11]
    return name
