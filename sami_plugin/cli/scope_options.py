"""The options that say which flows of this host are meant."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sami_plugin.cli import configuration
from sami_plugin.errors import ConfigurationError

if TYPE_CHECKING:
    from sami_plugin.model.scope import Scope

NAMED_NAMESPACES = "/run/netns"
DEFAULT_DRIVER = "linux_conntrack"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def add_scope_options(parser: argparse.ArgumentParser) -> None:
    """For commands that read flows and those that write them."""
    group = parser.add_argument_group("which flows")
    group.add_argument(
        "--namespace",
        metavar="PATH|NAME",
        help=f"network namespace of the firewall: a path, or a name under {NAMED_NAMESPACES} (default: this process's)",
    )
    group.add_argument(
        "--zone", metavar="N", type=zone, required=True, help="conntrack zone of the port on this host, 0 to 65535"
    )
    group.add_argument(
        "--address",
        metavar="A",
        type=address,
        action="append",
        default=[],
        help="only flows that have this IPv4 or IPv6 address at one end; may be repeated",
    )
    group.add_argument(
        "--shared",
        action="store_true",
        help="other ports have flows in the zone too; wants --address to tell them apart",
    )
    group.add_argument(
        "--driver",
        metavar="NAME",
        default=DEFAULT_DRIVER,
        help=f"firewall driver, see `sami driver list` (default: {DEFAULT_DRIVER})",
    )
    configuration.add_config_file(parser)


def zone(text: str) -> int:
    """An argparse type."""
    if not (text.isascii() and text.isdigit() and int(text) <= 0xFFFF):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 65535")
    return int(text)


def address(text: str) -> Address:
    """An argparse type. Takes an address in full: netaddr would take ``10`` for one."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no IPv4 or IPv6 address") from error
    if isinstance(found, ipaddress.IPv6Address) and found.scope_id:
        words = f"names an interface, which no flow's address does; leave %{found.scope_id} out"
        raise argparse.ArgumentTypeError(f"{text!r} {words}")
    return found


def count(text: str) -> int:
    """An argparse type."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no count")
    return int(text)


def scope_of(arguments: argparse.Namespace, neighbours: Sequence[Address] = ()) -> Scope:
    """The scope that was asked for; `is_shared` is what was said, whether or not there are addresses.

    :raises ConfigurationError: the options do not go together.
    """
    import netaddr

    from sami_plugin.model.flows import ZoneRole
    from sami_plugin.model.scope import Scope

    if arguments.shared and not arguments.address:
        raise ConfigurationError(
            "--shared: name the port's addresses with --address; other flows of the zone are not its"
        )
    namespace = arguments.namespace
    if namespace is not None and "/" not in namespace:
        namespace = f"{NAMED_NAMESPACES}/{namespace}"
    return Scope(
        port="",
        guest="",
        zones={ZoneRole.PORT: arguments.zone},
        addresses=tuple(netaddr.IPAddress(str(one)) for one in arguments.address),
        namespace=namespace,
        is_shared=arguments.shared,
        neighbours=tuple(netaddr.IPAddress(str(one)) for one in neighbours),
    )
