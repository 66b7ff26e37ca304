"""What `sami doctor` tries, in the order in which things are needed.

Each check is a function that returns what it found. Nothing of the host is changed: entries are made in a network
namespace that goes away with the check.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import json
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from sami_plugin import errors
from sami_plugin.cli import configuration
from sami_plugin.cli.configuration import AgentConfiguration

if TYPE_CHECKING:
    from sami_plugin.drivers.base import Capabilities, FlowDriver
    from sami_plugin.model.domain import Domain
    from sami_plugin.model.flows import Batch, Template
    from sami_plugin.model.scope import Scope


class Result(enum.Enum):
    """What a check found."""

    OK = "ok"
    LIMITED = "limited"
    """It works less well, or could not be tried."""
    MISSING = "missing"
    """It is needed and is not there."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's table."""

    name: str
    result: Result
    reason: str
    mend: str = ""


LEAST_PYTHON = (3, 11)
LEAST_NUMPY = (1, 24)
LEAST_HEADROOM = 0.2
SOON_DAYS = 30
WANTED_BUFFER = 32 << 20
ENTRY_POINTS = ("sami.drivers", "sami.kinds", "sami.scopes", "sami.policies", "sami.cli")
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21
_SO_RCVBUFFORCE = 33
_WAIT_SECONDS = 2.0
_RUN_PRIVILEGED = "run as root, or as the agent's user with the unit's AmbientCapabilities"


def all_checks(config_files: list[str] | None) -> Iterator[Check]:
    """Tries everything; blocks for some seconds at most, where a broker does not answer."""
    yield _python()
    yield _numpy()
    yield _net_admin()
    yield _sys_admin()
    yield from _conntrack()
    yield from _throw_away()
    yield _events_sysctl()
    yield _receive_buffer()
    yield from _configured(config_files)
    yield _extra("zstd", "zstandard", "payloads between hosts are compressed with zlib, which is slower")
    yield _extra("plots", "matplotlib", "`sami report --picture` cannot draw")
    yield from _entry_points()


# --- this process


def _python() -> Check:
    found = platform.python_version()
    if sys.version_info < LEAST_PYTHON:
        return Check("python", Result.MISSING, f"{found} is too old", "install Python 3.11 or newer")
    return Check("python", Result.OK, found)


def _numpy() -> Check:
    try:
        import numpy as np
    except ImportError as error:
        return Check("numpy", Result.MISSING, str(error), "install numpy 1.24 or newer")
    if tuple(int(part) for part in np.__version__.split(".")[:2]) < LEAST_NUMPY:
        return Check("numpy", Result.MISSING, f"{np.__version__} is too old", "install numpy 1.24 or newer")
    return Check("numpy", Result.OK, np.__version__)


def _net_admin() -> Check:
    if _has_capability(_CAP_NET_ADMIN):
        return Check("CAP_NET_ADMIN", Result.OK, "effective")
    reason = "not effective: the kernel tells this process nothing of conntrack"
    return Check("CAP_NET_ADMIN", Result.MISSING, reason, _RUN_PRIVILEGED)


def _sys_admin() -> Check:
    if _has_capability(_CAP_SYS_ADMIN):
        return Check("CAP_SYS_ADMIN", Result.OK, "effective")
    reason = "not effective: firewalls in other network namespaces cannot be reached"
    return Check("CAP_SYS_ADMIN", Result.LIMITED, reason, f"if ports have namespaces of their own, {_RUN_PRIVILEGED}")


def _has_capability(number: int) -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next((line.split()[1] for line in file if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> number & 1)


# --- the kernel


def _conntrack() -> Iterator[Check]:
    from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver

    name = "nf_conntrack"
    is_loaded = os.path.exists("/proc/sys/net/netfilter/nf_conntrack_max")
    try:
        can = LinuxConntrackDriver().capabilities()
    except errors.NotPermitted as error:
        loaded = "the module is there" if is_loaded else "the module seems not to be loaded"
        yield Check(name, Result.MISSING, f"{error} ({loaded})", _RUN_PRIVILEGED)
        return
    except errors.SamiError as error:
        yield Check(name, Result.MISSING, str(error), "modprobe nf_conntrack_netlink")
        return
    yield Check(name, Result.OK, f"the kernel {platform.release()} answers")
    yield _headroom(can)


def _headroom(can: Capabilities) -> Check:
    name = "table headroom"
    if can.capacity is None:
        return Check(name, Result.OK, f"{can.in_use} entries, and the kernel tells no limit")
    free = can.capacity - can.in_use
    reason = f"{can.in_use} of {can.capacity} entries are used in this namespace; the limit is for each namespace alike"
    if free <= 0:
        return Check(name, Result.MISSING, reason, "raise net.netfilter.nf_conntrack_max")
    if free < LEAST_HEADROOM * can.capacity:
        return Check(name, Result.LIMITED, reason, "raise net.netfilter.nf_conntrack_max; a full table drops others")
    return Check(name, Result.OK, reason)


def _throw_away() -> Iterator[Check]:
    """What the kernel does with flows, tried where nobody is."""
    from sami_plugin import privileged

    trials = "trial namespace"
    try:
        here = privileged.in_new_namespace(lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
    except (errors.SamiError, OSError) as error:
        yield Check(trials, Result.LIMITED, f"{error}; what the kernel does with flows was not tried", _RUN_PRIVILEGED)
        return
    try:
        yield Check(trials, Result.OK, "a network namespace can be made, and goes away again")
        yield from _trials(f"/proc/{os.getpid()}/fd/{here}")
    finally:
        os.close(here)


_KINDS = ("flows over IPv4", "tcp-ipv4"), ("flows over IPv6", "tcp-ipv6"), ("UDP flows", "udp-ipv4")


def _trials(namespace: str) -> Iterator[Check]:
    from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
    from sami_plugin.drivers.linux_conntrack.probe import features
    from sami_plugin.model.flows import TEMPLATES

    driver = LinuxConntrackDriver()
    try:
        yield _tried("events", lambda: _events(driver, namespace))
        for name, template in _KINDS:
            yield _tried(name, functools.partial(_kept, name, driver, namespace, TEMPLATES[template]))
        yield _tried("marks", lambda: _marks(driver, namespace))
        yield _tried("removal", lambda: _removal(driver, namespace))
    finally:
        driver.close()
    found = features()
    yield from _optional(found.optional)
    if found.keeps_zones is False:
        mend = "use a kernel with CONFIG_NF_CONNTRACK_ZONES"
        yield Check("zones", Result.MISSING, "the kernel has no conntrack zones", mend)
    elif found.filters_dump_by_zone:
        yield Check("dump of one zone", Result.OK, "the kernel tells the entries of one zone alone")
    else:
        reason = found.why_unknown or "the kernel tells all entries when asked for one zone's, so exports take longer"
        yield Check("dump of one zone", Result.LIMITED, reason, "a kernel from 6.8 on does better")


def _optional(kept: frozenset[str] | None) -> Iterator[Check]:
    """Whether the kernel tracks the protocols that not every kernel does, and makes a NAT."""
    from sami_plugin.drivers.linux_conntrack.attributes import OPTIONAL
    from sami_plugin.model.flows import TEMPLATES

    wanted = {
        f"{protocol.label} flows": ({f"{protocol.kind}-{family}" for family in protocol.families}, option)
        for protocol, option in OPTIONAL.items()
    }
    translated = {
        each.name
        for each in TEMPLATES.values()
        if each.is_translated and not each.is_extended and each.protocol not in OPTIONAL
    }
    for name, (templates, option) in {**wanted, "flows with a NAT": (translated, "CONFIG_NF_NAT")}.items():
        if kept is None:
            yield Check(name, Result.LIMITED, "it could not be tried whether the kernel tracks them", _RUN_PRIVILEGED)
        elif templates <= kept:
            yield Check(name, Result.OK, "an entry of each family was made, and read back with what was asked for")
        else:
            reason = "the kernel does not track them, or not with all that they have; they are left behind"
            yield Check(name, Result.LIMITED, reason, f"if guests use it, use a kernel with {option}")


def _tried(name: str, trial: Callable[[], Check]) -> Check:
    try:
        return trial()
    except (errors.SamiError, OSError) as error:
        return Check(name, Result.MISSING, str(error))


_ZONE = 7


def _scope(namespace: str, template: Template) -> Scope:
    import netaddr

    from sami_plugin.model.flows import ZoneRole
    from sami_plugin.model.scope import Scope

    address = netaddr.IPAddress("2001:db8::1" if template.is_ipv6 else "192.0.2.1")
    return Scope("doctor", "doctor", {ZoneRole.PORT: _ZONE}, (address,), namespace)


def _flow(template: Template, port: int) -> Batch:
    """One flow from the address of `_scope`; a TCP flow is established and tracked without regard to windows."""
    from sami_plugin.model.flows import Batch, FlowStatus, ZoneRole
    from sami_plugin.model.protocols import TcpState

    rows = template.empty(1)
    family = "IPv6" if template.is_ipv6 else "IPv4"
    ends = (0x20010DB8 << 32, 1), (0x20010DB8 << 32, 2)
    for end, field in enumerate((f"source{family}Address", f"destination{family}Address")):
        rows[field] = ends[end] if template.is_ipv6 else 0xC0000201 + end
    rows["zoneRole"] = ZoneRole.PORT
    rows["sourceTransportPort"], rows["destinationTransportPort"] = port, 443
    rows["conntrackStatus"] = FlowStatus.SEEN_REPLY | FlowStatus.ASSURED | FlowStatus.CONFIRMED
    rows["remainingTimeoutSeconds"], rows["flowMark"] = 600, 0x2A
    rows["protocolIdentifier"] = template.protocol.number
    if template.name.startswith("tcp"):
        rows["tcpConnectionState"] = TcpState.ESTABLISHED
        rows["tcpWindowScale"], rows["reverseTcpWindowScale"] = 7, 8
        rows["tcpTrackingFlags"], rows["reverseTcpTrackingFlags"] = _BE_LIBERAL, _BE_LIBERAL
    return Batch(template, rows)


_BE_LIBERAL = 0x8 | 0x2 | 0x1


def _insert(driver: FlowDriver, namespace: str, batch: Batch) -> tuple[Batch | None, str]:
    """What the kernel holds of one flow after it took it, or why it did not."""
    from sami_plugin.model.results import WORDS, Reason, is_in_device

    scope = _scope(namespace, batch.template)
    made = driver.insert(scope, batch)
    if not is_in_device(made).all():
        return None, WORDS[Reason(int(made["reason"][0]))]
    found, is_there = driver.read_back(scope, batch)
    return (found, "") if is_there.all() else (None, WORDS[Reason.VANISHED])


def _events(driver: FlowDriver, namespace: str) -> Check:
    from sami_plugin.model.flows import TEMPLATES

    template = TEMPLATES["udp-ipv4"]
    mend = "load nf_conntrack_netlink; use a kernel with CONFIG_NF_CONNTRACK_EVENTS"
    with driver.watch(_scope(namespace, template)) as watch:
        refused = _insert(driver, namespace, _flow(template, 1000))[1]
        if refused:
            return Check("events", Result.MISSING, f"an entry could not be made: {refused}", mend)
        if any(len(batch) for batch in watch.collect().upserts):
            return Check("events", Result.OK, "a new entry was told at once")
    return Check("events", Result.MISSING, "a new entry was not told", mend)


def _kept(name: str, driver: FlowDriver, namespace: str, template: Template) -> Check:
    from sami_plugin.model.results import lost_fields

    sent = _flow(template, 2000)
    found, refused = _insert(driver, namespace, sent)
    if found is None:
        return Check(name, Result.MISSING, f"an entry could not be made: {refused}")
    # Marks have a check of their own.
    lost = [
        field[0]
        for position, field in enumerate(template.state)
        if int(lost_fields(sent, found.rows)[0]) >> position & 1 and field[0] != "flowMark"
    ]
    if lost:
        return Check(name, Result.LIMITED, f"taken, but not kept: {', '.join(lost)}", "use a newer kernel")
    kept = "state, window scale and liberal tracking" if template.name.startswith("tcp") else "what was asked for"
    return Check(name, Result.OK, f"an entry was made, and read back with {kept}")


def _marks(driver: FlowDriver, namespace: str) -> Check:
    from sami_plugin.model.flows import TEMPLATES

    sent = _flow(TEMPLATES["udp-ipv4"], 3000)
    found, refused = _insert(driver, namespace, sent)
    if found is None:
        return Check("marks", Result.MISSING, f"an entry could not be made: {refused}")
    if found.rows["flowMark"][0] == sent.rows["flowMark"][0]:
        return Check("marks", Result.OK, "an entry's mark was kept")
    mend = "use a kernel with CONFIG_NF_CONNTRACK_MARK, if your rules look at marks"
    return Check("marks", Result.LIMITED, "an entry's mark was not kept", mend)


def _removal(driver: FlowDriver, namespace: str) -> Check:
    from sami_plugin.model.flows import TEMPLATES
    from sami_plugin.model.results import Outcome

    sent = _flow(TEMPLATES["udp-ipv4"], 4000)
    found, refused = _insert(driver, namespace, sent)
    if found is None:
        return Check("removal", Result.MISSING, f"an entry could not be made: {refused}")
    scope = _scope(namespace, sent.template)
    made = driver.remove(scope, found.identities)
    if made["outcome"][0] == Outcome.REMOVED and not driver.read_back(scope, sent)[1].any():
        return Check("removal", Result.OK, "an entry was removed by its name and id, and is gone")
    return Check("removal", Result.MISSING, "an entry that was removed is still there")


def _events_sysctl() -> Check:
    name = "nf_conntrack_events"
    try:
        with open(f"/proc/sys/net/netfilter/{name}", encoding="ascii") as file:
            value = int(file.read())
    except (OSError, ValueError) as error:
        reason = f"net.netfilter.{name} cannot be read ({error}), so whether events are on here is unknown"
        return Check(name, Result.LIMITED, reason, "modprobe nf_conntrack")
    if value == 0:
        mend = f"sysctl net.netfilter.{name}=2 here, and in every namespace with a firewall of guests"
        return Check(name, Result.MISSING, "0: no entry of this namespace tells its changes", mend)
    if value == 1:
        return Check(name, Result.OK, "1: every entry of this namespace tells its changes")
    reason = f"{value}: entries tell changes if somebody listened when they were made; older ones are looked up again"
    return Check(name, Result.OK, reason)


def _receive_buffer() -> Check:
    name = "SO_RCVBUFFORCE"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as tried:
        try:
            tried.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, WANTED_BUFFER)
        except PermissionError:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WANTED_BUFFER)
        given = tried.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2  # the kernel tells twice what it gave
    if given >= WANTED_BUFFER:
        return Check(name, Result.OK, f"event buffers of {WANTED_BUFFER >> 20} MiB are given")
    reason = f"event buffers are {given >> 10} KiB instead of {WANTED_BUFFER >> 20} MiB, so bursts of events are lost"
    return Check(name, Result.LIMITED, reason, f"{_RUN_PRIVILEGED}, or raise net.core.rmem_max to {WANTED_BUFFER}")


# --- what the agent is configured to use


def _configured(files: list[str] | None) -> Iterator[Check]:
    from sami_plugin.cli.broker_checks import broker

    name = "configuration"
    mend = "mend the file; sami-agent.conf.sample shows every option"
    try:
        known = configuration.load(files)
    except errors.ConfigurationError as error:
        yield Check(name, Result.MISSING, str(error), mend)
        return
    wrong = list(configuration.complaints(files))
    if wrong:
        yield Check(name, Result.MISSING, "; ".join(wrong), mend)
    elif files is None and not os.path.exists(configuration.DEFAULT_FILE):
        mend = f"copy sami-agent.conf.sample to {configuration.DEFAULT_FILE}"
        yield Check(name, Result.LIMITED, f"{configuration.DEFAULT_FILE} is not there; the defaults apply", mend)
    else:
        yield Check(name, Result.OK, f"{', '.join(files or [configuration.DEFAULT_FILE])} is read")
    for name, own in known.drivers.items():
        yield _driver(name, own)
    yield _journal(known.journal)
    yield broker(known.transport_url, is_tls=known.is_broker_tls)
    yield _certificate(known)
    yield from _domains(known, files)
    yield from _libvirt(known)
    yield _agent_socket(known.socket)
    yield from _scopes(known, files)


def _libvirt(known: AgentConfiguration) -> Iterator[Check]:
    from sami_plugin.cli import hook_checks

    if hook_checks.is_expected(known.libvirt_uri):
        yield from hook_checks.hook(known.libvirt_uri, known.socket)
        return
    reason = "no libvirt daemon can be seen here: something else has to tell the agent of migrations"
    mend = (
        f"if this host's guests are libvirt's: systemctl start libvirtd, and set uri = {hook_checks.URI} in [libvirt]"
    )
    yield Check("libvirt", Result.LIMITED, reason, mend)


def _driver(name: str, own: Mapping[str, object]) -> Check:
    from sami_plugin.drivers import loader

    try:
        can = loader.load_driver(name, **own).capabilities()
    except errors.SamiError as error:
        return Check("driver", Result.MISSING, f"{name}: {error}", "`sami driver list` shows which can be used")
    if can.notes:
        return Check("driver", Result.LIMITED, f"{name}: {'; '.join(can.notes)}")
    return Check("driver", Result.OK, f"{name} carries {', '.join(sorted(can.templates))}")


def _scopes(known: AgentConfiguration, files: list[str] | None) -> Iterator[Check]:
    from sami_plugin.scopes.loader import load_scopes

    name = "scopes"
    is_static = known.scopes == "static"
    mend = "[agent] scopes names what finds the ports of this host, and its own options where it looks"
    if is_static:
        mend = "[agent] scope_file names a JSON file of this host's ports; the documentation's page on scopes shows one"
    try:
        finder = load_scopes(known.scopes, configuration.options(files))
        finder.find("")
        namespaces = finder.namespaces()
        reason = f"{known.scopes} answers"
        if is_static:
            with open(known.scope_file, encoding="utf-8") as file:
                reason = f"{known.scope_file} lists {len(json.load(file)['ports'])} ports"
    except (errors.SamiError, OSError, ValueError) as error:
        yield Check(name, Result.MISSING, " ".join(str(error).split()), mend)
        return
    yield Check(name, Result.OK, reason)
    yield _capabilities([one for one in namespaces if one is not None])


def _capabilities(others: list[str]) -> Check:
    """What the agent needs for the network namespaces of these ports: its unit has to give it that."""
    name = "agent's capabilities"
    if not others:
        return Check(name, Result.OK, "CAP_NET_ADMIN alone: no port's state is in another network namespace")
    reason = f"CAP_NET_ADMIN, and CAP_SYS_ADMIN to enter {len(others)} network namespaces, {others[0]} among them"
    if _has_capability(_CAP_SYS_ADMIN):
        return Check(name, Result.OK, reason)
    return Check(name, Result.MISSING, f"{reason}; this process has not", f"give both to the agent; {_RUN_PRIVILEGED}")


def _journal(path: str) -> Check:
    name = "journal"
    folder = os.path.dirname(os.path.abspath(path))
    mend = f"make {folder} writable for the agent's user, on a disk that survives a restart"
    if os.path.exists(path):
        from sami_plugin.journal.journal import Journal

        try:
            Journal(path, read_only=True).close()
        except errors.SamiError as error:
            return Check(name, Result.MISSING, str(error), mend)
        if not os.access(path, os.W_OK):
            return Check(name, Result.MISSING, f"{path} cannot be written by this user", mend)
    there = folder
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if there != folder:
        if os.access(there, os.W_OK | os.X_OK):
            return Check(name, Result.OK, f"{folder} is not there, and can be made")
        return Check(name, Result.MISSING, f"{folder} is not there, and cannot be made by this user", mend)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            begin = time.monotonic()
            file.write(b"sami")
            file.flush()
            os.fsync(file.fileno())
            took = (time.monotonic() - begin) * 1000
    except OSError as error:
        return Check(name, Result.MISSING, f"{folder} cannot be written: {error.strerror}", mend)
    return Check(name, Result.OK, f"{folder} can be written; to the disk in {took:.1f} ms")


def _agent_socket(path: str) -> Check:
    name = "socket"
    mend = "[agent] socket names a path in a folder that the agent's user may write"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tried:
        tried.settimeout(_WAIT_SECONDS)
        try:
            tried.connect(path)
            return Check(name, Result.OK, f"an agent listens at {path}")
        except PermissionError:
            return Check(name, Result.LIMITED, f"{path} is another user's", "run as the agent's user")
        except ConnectionRefusedError:
            return Check(name, Result.LIMITED, f"{path} is there, and no agent listens", "start sami-agent")
        except FileNotFoundError:
            pass
        except OSError as error:
            return Check(name, Result.MISSING, f"{path}: {error}", mend)
    there = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if not os.access(there, os.W_OK | os.X_OK):
        return Check(name, Result.MISSING, f"{path} is not there, and cannot be made by this user", mend)
    return Check(name, Result.LIMITED, f"no agent listens; {path} can be made", "start sami-agent")


def _certificate(known: AgentConfiguration) -> Check:
    from sami_plugin.channel.identity import Credentials, days_until, utc

    name = "certificate"
    mend = "`sami pki` makes certificates, and the installation page tells where they go"
    try:
        credentials = Credentials(known.host, known.tls)
        left = days_until(utc(credentials.certificate(), "not_valid_after"))
    except errors.SamiError as error:
        return Check(name, Result.MISSING, str(error), mend)
    reason = f"{known.tls.certificate} is that of {known.host} and counts for {int(left)} days more"
    if known.tls.revoked is None:
        return Check(name, Result.LIMITED, f"{reason}; no list of revoked ones is used", "set [tls] revoked")
    if left < SOON_DAYS:
        return Check(name, Result.LIMITED, reason, f"renew it: `sami pki renew {known.host}`")
    return Check(name, Result.OK, reason)


def _domains(known: AgentConfiguration, files: list[str] | None) -> Iterator[Check]:
    from oslo_config import cfg

    from sami_plugin import conf
    from sami_plugin.policies.chosen import Policies

    try:
        options = configuration.options(files)
        domains = conf.domains(options)
        if domains:
            Policies.from_conf(options, domains)
    except (errors.SamiError, cfg.Error, ValueError) as error:
        mend = "mend the file; sami-agent.conf.sample shows every option"
        yield Check("domains", Result.MISSING, configuration.words(error), mend)
        return
    yield from (_domain(known, domain) for domain in domains)


def _domain(known: AgentConfiguration, domain: Domain) -> Check:
    from sami_plugin.channel.identity import Credentials
    from sami_plugin.cli.broker_checks import broker

    name = f"domain {domain.name}"
    try:
        Credentials(known.host, domain.credentials, f"domain:{domain.name}")
    except errors.SamiError as error:
        return Check(name, Result.MISSING, str(error), "ask the domain's operator for the file")
    found = broker(domain.transport_url or known.transport_url, is_tls=known.is_broker_tls)
    if found.result is not Result.OK:
        return Check(name, found.result, found.reason, f"[domain:{domain.name}] transport_url; {found.mend}")
    if domain.credentials.revoked is None:
        mend = f"set [domain:{domain.name}] revoked"
        return Check(name, Result.LIMITED, "no list of the hosts that were revoked there is used", mend)
    return Check(name, Result.OK, f"{', '.join(domain.hosts)} by {domain.credentials.authorities}; {found.reason}")


# --- what is installed


def _extra(extra: str, module: str, without: str) -> Check:
    name = f"extra {extra}"
    # Looked for and not imported: matplotlib makes folders when it is.
    if importlib.util.find_spec(module) is None:
        return Check(name, Result.LIMITED, f"{module} is not installed: {without}", f"pip install sami_plugin[{extra}]")
    return Check(name, Result.OK, f"{module} {metadata.version(module)}")


def _entry_points() -> Iterator[Check]:
    for group in ENTRY_POINTS:
        name = f"entry points {group}"
        points = sorted(metadata.entry_points(group=group), key=lambda point: point.name)
        broken = []
        for point in points:
            try:
                point.load()
            except Exception as error:  # noqa: BLE001 - a plugin of others may raise anything; it is what is looked for
                broken.append(f"{point.name}: {type(error).__name__}: {error}")
        if broken:
            yield Check(name, Result.MISSING, "; ".join(broken), "install what it needs, or remove its package")
        elif not points:
            yield Check(name, Result.MISSING, "there are none", "install sami_plugin, do not just copy it")
        else:
            yield Check(name, Result.OK, ", ".join(point.name for point in points))
