"""What the agent's configuration says, for commands that look at what the agent works with."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sami_plugin.errors import ConfigurationError, SamiError

if TYPE_CHECKING:
    from oslo_config import cfg

    from sami_plugin.model.settings import Files

DEFAULT_FILE = "/etc/sami/sami-agent.conf"


@dataclass(frozen=True, slots=True)
class AgentConfiguration:
    """The options that are of use outside the agent."""

    host: str
    drivers: Mapping[str, Mapping[str, object]]
    """By name, each with its options; the first is the firewall's."""
    scopes: str
    scope_file: str
    journal: str
    socket: str
    transport_url: str
    is_broker_tls: bool
    """Where the URL says nothing else."""
    libvirt_uri: str
    tls: Files


def add_config_file(parser: argparse.ArgumentParser) -> None:
    """The option that names the files for `load`."""
    parser.add_argument(
        "--config-file",
        metavar="PATH",
        action="append",
        help=f"configuration of the agent; may be repeated, the last wins (default: {DEFAULT_FILE}, if it is there)",
    )


def load(files: list[str] | None) -> AgentConfiguration:
    """What these files say; None is the default file, or the options' defaults where that is missing.

    :raises ConfigurationError: a file cannot be read, or holds what is no value of its option.
    """
    from oslo_config import cfg

    from sami_plugin import conf as known

    conf = options(files)
    try:
        agent = conf.agent
        return AgentConfiguration(
            agent.host,
            known.driver_options(conf),
            agent.scopes,
            agent.scope_file,
            agent.journal,
            agent.socket,
            conf.transport_url,
            conf.oslo_messaging_rabbit.ssl,
            conf.libvirt.uri,
            known.tls_files(conf),
        )
    except (cfg.Error, ValueError) as error:
        raise ConfigurationError(f"configuration: {words(error)}") from error


def options(files: list[str] | None) -> cfg.ConfigOpts:
    """All that these files say, as `load`; a wrong value is told when it is read.

    :raises ConfigurationError: a file cannot be read.
    """
    from oslo_config import cfg

    conf = _read(files)
    # oslo.messaging's own options, by their names and defaults: it registers them only when a transport is made.
    conf.register_opt(cfg.StrOpt("transport_url", default="rabbit://", secret=True))
    conf.register_opt(cfg.BoolOpt("ssl", default=False), group="oslo_messaging_rabbit")
    return conf


def _read(files: list[str] | None) -> cfg.ConfigOpts:
    from oslo_config import cfg

    from sami_plugin import conf as known

    if files is None:
        files = [DEFAULT_FILE] if os.path.exists(DEFAULT_FILE) else []
    conf = cfg.ConfigOpts()
    known.register(conf)
    try:
        conf(args=[], project="sami", prog="sami-agent", default_config_files=files, default_config_dirs=[])
    except (cfg.Error, OSError, ValueError) as error:
        raise ConfigurationError(f"configuration: {words(error)}") from error
    return conf


def complaints(files: list[str] | None) -> Iterator[str]:
    """What the agent would say of these files and not start; domains, driver and scopes are looked at apart.

    :raises ConfigurationError: as `options`.
    """
    from oslo_config import cfg

    from sami_plugin import conf as known
    from sami_plugin import notifications
    from sami_plugin.drivers.loader import load_kinds
    from sami_plugin.hooks.local_socket import group_id, user_id
    from sami_plugin.policies.chosen import Policies

    load_kinds()
    conf = _read(files)
    groups = [name for name in conf if isinstance(conf[name], cfg.ConfigOpts.GroupAttr)]
    readings: list[Callable[[], object]] = [partial(getattr, conf[name], one) for name in groups for one in conf[name]]
    readings += [
        partial(known.settings, conf),
        partial(known.retention, conf),
        lambda: Policies.from_conf(conf, ()),
        lambda: notifications.from_conf(conf, conf.agent.host),
        lambda: conf.agent.socket_group and group_id(conf.agent.socket_group),
        lambda: list(map(user_id, conf.agent.socket_users)),
    ]
    told = set()
    for reading in readings:
        try:
            reading()
        except (SamiError, cfg.Error, ValueError) as error:
            if (said := words(error)) not in told:
                told.add(said)
                yield said


def words(error: Exception) -> str:
    """What oslo.config complains about, in one line; it names files in its own notation."""
    if isinstance(error, UnicodeDecodeError):
        # Of the line only what stands before "=": a password may stand behind it.
        begin = error.object[: error.start].rpartition(b"\n")[2].partition(b"=")[0].decode("ascii", "replace").strip()
        octet = error.object[error.start]
        return f"a file is not UTF-8: octet {octet:#04x} in the line that begins with {begin[:40]!r}; write it anew"
    told = re.sub(r"LocationInfo\(location=.*?, detail='?(.*?)'?\)", r"\1", str(error))
    return " ".join(told.split())
