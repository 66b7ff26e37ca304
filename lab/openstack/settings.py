"""What stands in the configuration files of every machine, by path below its /etc. Nothing is configured elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lab.openstack import addresses, parts

PASSWORD = "lab"  # noqa: S105, of everything; nothing listens outside of the lab
REGION = "RegionOne"
BROKER_PORT = 5672
BROKER = f"rabbit://guest:guest@127.0.0.1:{BROKER_PORT}/"
"""Each machine has the way to the lab's broker on its own loopback."""

CONTROLLER = addresses.UNDERLAY[addresses.CONTROLLER]
PORTS = {"keystone": 5000, "nova": 8774, "placement": 8778, "glance": 9292, "neutron": 9696, "nova-metadata": 8775}
KINDS = {"glance": "image", "placement": "placement", "neutron": "network", "nova": "compute"}
"""Of services, as the catalogue calls them."""

URLS = {
    "identity": f"http://{CONTROLLER}:{PORTS['keystone']}/v3",
    "image": f"http://{CONTROLLER}:{PORTS['glance']}",
    "placement": f"http://{CONTROLLER}:{PORTS['placement']}",
    "network": f"http://{CONTROLLER}:{PORTS['neutron']}",
    "compute": f"http://{CONTROLLER}:{PORTS['nova']}/v2.1",
}
"""As the catalogue has them."""
DATABASES = ("keystone", "glance", "placement", "neutron", "nova_api", "nova", "nova_cell0")

DATA = Path("/run/lab/data")
"""On the controller; what `lab.openstack.golden` keeps of it is the cloud's whole memory."""
MYSQL_SOCKET = Path("/run/lab/mysql.sock")

Groups = Mapping[str, Mapping[str, object]]
"""Options by group. An option that may be given several times has a list."""


def database(name: str) -> str:
    """How a service reaches its database."""
    return f"mysql+pymysql://root:{PASSWORD}@{CONTROLLER}/{name}?charset=utf8"


def text(groups: Groups) -> str:
    """The file."""
    lines = []
    for group, options in groups.items():
        lines.append(f"[{group}]")
        for name, value in options.items():
            lines += [f"{name} = {one}" for one in (value if isinstance(value, list) else [value])]
    return "\n".join(lines) + "\n"


def with_line(words: str, group: str, line: str) -> str:
    """A file's words, with one more line in a group that it has."""
    assert f"[{group}]\n" in words
    return words.replace(f"[{group}]\n", f"[{group}]\n{line}\n", 1)


def without_line(words: str, group: str, line: str) -> str:
    """Undo `with_line`."""
    return words.replace(f"[{group}]\n{line}\n", f"[{group}]\n", 1)


def controller() -> dict[str, str]:
    """Its files."""
    neutron = {**_neutron(), "database": {"connection": database("neutron"), "max_pool_size": 10}}
    nova = {
        **_nova(addresses.CONTROLLER),
        "api_database": {"connection": database("nova_api")},
        "database": {"connection": database("nova")},
    }
    files = {
        "keystone/keystone.conf": _keystone(),
        "placement/placement.conf": _placement(),
        "glance/glance-api.conf": _glance(),
        "nova/nova.conf": nova,
        "nova/nova-metadata.conf": _nova_metadata(),
        "neutron/neutron.conf": neutron,
        "neutron/ml2.ini": _ml2(),
    }
    return {"mysql.cnf": MYSQL, "nova/policy.yaml": POLICY} | {path: text(groups) for path, groups in files.items()}


def compute(host: str) -> dict[str, str]:
    """The files of a compute host. nova-compute must know no database: it would use it, and fail."""
    files = {
        "nova/nova.conf": {**_nova(host), **_nova_compute(host)},
        "neutron/neutron.conf": _neutron(),
        "neutron/linuxbridge_agent.ini": _linuxbridge(host),
    }
    return {path: text(groups) for path, groups in files.items()}


def _login(user: str) -> dict[str, object]:
    return {
        "auth_type": "password",
        "auth_url": URLS["identity"],
        "username": user,
        "password": PASSWORD,
        "project_name": "service",
        "user_domain_name": "Default",
        "project_domain_name": "Default",
        "region_name": REGION,
    }


def _token_check(user: str) -> Groups:
    return {"keystone_authtoken": {"www_authenticate_uri": URLS["identity"], **_login(user)}}


def _privsep(*sections: str) -> Groups:
    """All are root in namespaces of their own: no sudo, no rootwrap."""
    return {section: {"helper_command": "/usr/bin/privsep-helper"} for section in sections}


MYSQL = f"""[mysqld]
user = root
datadir = {DATA}/mysql
socket = {MYSQL_SOCKET}
pid-file = /run/lab/mysql.pid
bind-address = {CONTROLLER}
skip-name-resolve
max_connections = 600
innodb_buffer_pool_size = 192M
innodb_log_file_size = 32M
innodb_flush_log_at_trx_commit = 0
innodb_doublewrite = 0
performance_schema = 0
"""


# By default Nova keeps a flavor without a disk for administrators.
POLICY = """"os_compute_api:servers:create:zero_disk_flavor": "rule:project_member_or_admin"
"""


def _keystone() -> Groups:
    return {
        "DEFAULT": {"use_stderr": "true"},
        "database": {"connection": database("keystone")},
        "token": {"provider": "fernet", "expiration": 86400},
        "cache": {"enabled": "false"},
        "identity": {"password_hash_rounds": 4},
        "fernet_tokens": {"key_repository": DATA / "keystone/fernet"},
        "credential": {"key_repository": DATA / "keystone/credential"},
        # Nobody gets a receipt, but without their keys every login fails.
        "fernet_receipts": {"key_repository": DATA / "keystone/fernet"},
    }


def _placement() -> Groups:
    return {
        "DEFAULT": {"use_stderr": "true"},
        "placement_database": {"connection": database("placement")},
        "api": {"auth_strategy": "keystone"},
        **_token_check("placement"),
    }


def _glance() -> Groups:
    return {
        "DEFAULT": {"use_stderr": "true", "bind_host": CONTROLLER, "bind_port": PORTS["glance"], "workers": 1},
        "database": {"connection": database("glance")},
        "glance_store": {
            "stores": "file",
            "default_store": "file",
            "filesystem_store_datadir": DATA / "images",
        },
        "paste_deploy": {
            "flavor": "keystone",
            "config_file": parts.TREE / "usr/share/glance-common/glance-api-paste.ini",
        },
        **_token_check("glance"),
    }


def _nova(machine: str) -> Groups:
    return {
        "DEFAULT": {
            "use_stderr": "true",
            "host": machine,
            "my_ip": addresses.UNDERLAY[machine],
            "transport_url": BROKER,
            "state_path": "/var/lib/nova",
            "enabled_apis": "osapi_compute",
            "osapi_compute_listen": CONTROLLER,
            "osapi_compute_workers": 1,
            "compute_driver": "libvirt.LibvirtDriver",
            "rpc_response_timeout": 120,
            "vif_plugging_timeout": 90,
            "max_concurrent_live_migrations": 10,
            "service_down_time": 120,
            "reserved_host_memory_mb": 0,
            "reserved_host_disk_mb": 0,
            "cpu_allocation_ratio": 32,
            "ram_allocation_ratio": 4,
            "disk_allocation_ratio": 16,
            # A raw megabyte per guest: block migration copies it in no time.
            "use_cow_images": "false",
            "force_raw_images": "false",
        },
        "conductor": {"workers": 1},
        "scheduler": {"workers": 1},
        "wsgi": {"api_paste_config": parts.TREE / "usr/share/nova-common/api-paste.ini"},
        "api": {"auth_strategy": "keystone"},
        "quota": {"instances": -1, "cores": -1, "ram": -1},
        "neutron": _login("neutron"),
        "placement": _login("placement"),
        "glance": _login("glance"),
        "cinder": {"catalog_info": "volumev3::publicURL"},
        "oslo_concurrency": {"lock_path": "/run/lock"},
        "vnc": {"enabled": "false"},
        # As an operator has it who listens to notifications.
        "notifications": {"notification_format": "both"},
        "oslo_messaging_notifications": {"driver": "messagingv2"},
        **_token_check("nova"),
        **_privsep("nova_sys_admin", "vif_plug_linux_bridge_privileged", "vif_plug_ovs_privileged", "privsep_osbrick"),
    }


def _nova_metadata() -> Groups:
    """What is said after nova.conf, to a nova-api that serves metadata alone.

    It tells guests by the addresses that they ask from, which no two of the lab's networks share.
    """
    return {"DEFAULT": {"enabled_apis": "metadata", "metadata_listen": CONTROLLER, "metadata_workers": 1}}


def _nova_compute(host: str) -> Groups:
    return {
        "workarounds": {
            # Else Nova activates the port's binding twice at once, Neutron answers one with 500 now and then, and the
            # server is left in ERROR though it runs on the destination.
            "handle_virt_lifecycle_events": "false",
        },
        "libvirt": {
            "virt_type": "qemu",
            "cpu_mode": "none",
            "images_type": "raw",
            "live_migration_scheme": "tcp",
            "live_migration_inbound_addr": addresses.UNDERLAY[host],
        },
    }


def _neutron() -> Groups:
    return {
        "DEFAULT": {
            "use_stderr": "true",
            "core_plugin": "ml2",
            "service_plugins": "",
            "auth_strategy": "keystone",
            "transport_url": BROKER,
            "bind_host": CONTROLLER,
            "bind_port": PORTS["neutron"],
            "api_workers": 1,
            "rpc_workers": 1,
            "rpc_state_report_workers": 0,
            "api_paste_config": parts.TREE / "usr/share/neutron-common/api-paste.ini",
            "state_path": "/var/lib/neutron",
            "notify_nova_on_port_status_changes": "true",
            "notify_nova_on_port_data_changes": "true",
            "dhcp_agent_notification": "false",
            "agent_down_time": 120,
        },
        # Zed refuses the agent otherwise.
        "experimental": {"linuxbridge": "true"},
        "nova": _login("nova"),
        "oslo_concurrency": {"lock_path": "/run/lock"},
        "agent": {"root_helper": "", "root_helper_daemon": ""},
        **_token_check("neutron"),
        **_privsep(
            "privsep",
            "privsep_dhcp_release",
            "privsep_ovs_vsctl",
            "privsep_namespace",
            "privsep_conntrack",
            "privsep_link",
        ),
    }


SECURITY_GROUPS = {"enable_security_group": "true", "enable_ipset": "true", "firewall_driver": "iptables"}


def _ml2() -> Groups:
    return {
        "ml2": {
            "type_drivers": "flat",
            "tenant_network_types": "",
            "mechanism_drivers": "linuxbridge",
            "extension_drivers": "port_security",
        },
        "ml2_type_flat": {"flat_networks": ",".join(map(addresses.provider, addresses.NETWORKS.values()))},
        "securitygroup": SECURITY_GROUPS,
    }


def _linuxbridge(host: str) -> Groups:
    providers = map(addresses.provider, addresses.NETWORKS.values())
    return {
        "DEFAULT": {"host": host},
        "linux_bridge": {"physical_interface_mappings": ",".join(f"{name}:{name}" for name in providers)},
        "vxlan": {"enable_vxlan": "false"},
        # The default, on purpose: it makes the time in which a destination is open as long as in the field.
        "agent": {"polling_interval": 2},
        "securitygroup": SECURITY_GROUPS,
    }
