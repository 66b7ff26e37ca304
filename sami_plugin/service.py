"""The agent as a service: built of what the configuration says, and run until its time is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from oslo_config import cfg

from sami_plugin import conf as options
from sami_plugin import notifications
from sami_plugin.agent import Agent
from sami_plugin.channel.identity import Credentials
from sami_plugin.drivers import loader
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.errors import ConfigurationError
from sami_plugin.hooks.descriptions import Descriptions
from sami_plugin.hooks.libvirt_events import LibvirtHost
from sami_plugin.hooks.local_socket import LocalSocket, guest_of, text_of
from sami_plugin.journal.journal import Journal, opened
from sami_plugin.model.domain import Domain
from sami_plugin.model.settings import Settings
from sami_plugin.peers import Peers, Way
from sami_plugin.policies.chosen import Policies
from sami_plugin.refusals import Refusals
from sami_plugin.scopes.base import ScopeFinder
from sami_plugin.scopes.loader import load_scopes
from sami_plugin.session import Host
from sami_plugin.transport.rpc import Transport


def host_of(
    conf: cfg.ConfigOpts,
    *,
    name: str,
    driver: FlowDriver,
    scopes: ScopeFinder,
    journal: Journal,
    settings: Settings,
    credentials: Credentials,
    transport_url: str | None = None,
    domains: Sequence[Domain] = (),
    policies: Policies | None = None,
) -> Host:
    """This host. `domains` are the others than its own.

    :raises ConfigurationError: a broker is not one that this version may use, or a file of a domain does not do.
    """
    trusted = [Credentials(name, one.credentials, f"domain:{one.name}") for one in domains]
    own = Way(Transport(conf, name, transport_url), credentials)
    others = [
        Way(_transport_to(conf, name, one) or own.transport, each, one)
        for one, each in zip(domains, trusted, strict=True)
    ]
    peers, refusals, told = Peers(own, others), Refusals(name, journal), notifications.from_conf(conf, name)
    return Host(name, settings, driver, scopes, journal, peers, refusals, policies or Policies(), told)


def _transport_to(conf: cfg.ConfigOpts, name: str, domain: Domain) -> Transport | None:
    """The domain's broker, where it has one of its own."""
    if not domain.transport_url:
        return None
    try:
        return Transport(conf, name, domain.transport_url)
    except ConfigurationError as error:
        raise ConfigurationError(f"[domain:{domain.name}] {error}") from error


def run(conf: cfg.ConfigOpts, wait: Callable[[], object]) -> None:
    """Runs the agent that `conf` describes until `wait` returns.

    :raises SamiError: it cannot start; the message says what to change.
    """
    loader.load_kinds()  # a vendor's enterprise number among them is refused as one of ours
    settings, domains = options.settings(conf), options.domains(conf)
    driver, scopes = loader.load_drivers(options.driver_options(conf)), load_scopes(conf.agent.scopes, conf)
    credentials = Credentials(conf.agent.host, options.tls_files(conf))
    # Behind these: an agent whose configuration does not do leaves no file behind.
    journal, libvirt = opened(conf.agent.journal, options.retention(conf)), None
    if conf.libvirt.uri:
        libvirt = LibvirtHost(conf.libvirt.uri, conf.agent.host, Descriptions(journal))
    agent = Agent(
        host_of(
            conf,
            name=conf.agent.host,
            driver=driver,
            scopes=scopes,
            journal=journal,
            settings=settings,
            credentials=credentials,
            domains=domains,
            policies=Policies.from_conf(conf, domains),
        ),
        libvirt,
    )
    # Before anything is started: another agent that runs here is found while its journal and its queues are its own.
    socket = LocalSocket(
        conf.agent.socket,
        agent.tell,
        mode=int(conf.agent.socket_mode, 8),
        group=conf.agent.socket_group,
        users=conf.agent.socket_users,
        bounds=settings.bounds,
        refused=agent.host.refusals.note,
        requests={
            "announce": lambda said: agent.announce(
                guest_of(said),
                text_of(said, "source"),
                text_of(said, "destination"),
                text_of(said, "request_id") if said.get("request_id") else "",
            ),
            "check": lambda said: agent.check(guest_of(said), text_of(said, "to")),
            "approve": lambda said: agent.decide(text_of(said, "session"), may_come=True),
            "refuse": lambda said: agent.decide(text_of(said, "session"), may_come=False),
        },
    )
    with ExitStack() as stack:
        try:
            agent.start()
        except BaseException:
            socket.stop()
            raise
        stack.callback(agent.stop)
        socket.start()
        stack.callback(socket.stop)
        if libvirt is not None:
            libvirt.start(agent.note, agent.underway)
            stack.callback(libvirt.stop)
        wait()
