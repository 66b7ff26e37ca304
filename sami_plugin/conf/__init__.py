"""The agent's options. They are read once, in `agent.py`, and passed on as plain values."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import netaddr
from oslo_config import cfg, types

from sami_plugin.errors import ConfigurationError
from sami_plugin.model import information_elements
from sami_plugin.model.settings import MEBIBYTE, Bounds, Files, Limits, Retention, Settings
from sami_plugin.model.verdict import Verdict

if TYPE_CHECKING:
    from sami_plugin.model.domain import Domain

_DEFAULTS = Settings()
_LIMITS = Limits()
_BOUNDS = Bounds()
_RETENTION = Retention()

_MOST = 1e9
"""Of any number with a fraction: more seconds than about nine times that, nobody can wait for in Python."""


class _Number(types.Float):
    """A number that can be worked with: ``nan`` and ``inf`` are floats too."""

    def __call__(self, value: Any) -> float | None:
        number: float | None = super().__call__(value)
        if number is not None and not number <= _MOST:
            raise ValueError(f"{number:g} will not do; write a number of at most {_MOST:.0f}")
        return number


def _number(name: str, **more: Any) -> cfg.FloatOpt:
    option = cfg.FloatOpt(name, **more)
    option.type = _Number(more.get("min"), more.get("max"))
    return option


AGENT = cfg.OptGroup("agent", title="The agent of this host")
MIGRATION = cfg.OptGroup("migration", title="How a guest's flows are carried")
OVS = cfg.OptGroup("ovs", title="Open vSwitch on this host, for the scope finders `ovs` and `ovn`")
OVN = cfg.OptGroup("ovn", title="OVN, for the scope finder `ovn`")
DEPOSIT = cfg.OptGroup("deposit", title="What is kept for other hosts' devices, for the driver `deposit`")
LINUX_CONNTRACK = cfg.OptGroup("linux_conntrack", title="The kernel's conntrack, for the driver `linux_conntrack`")
NFT_SETS = cfg.OptGroup("nft_sets", title="nftables' sets and maps, for the driver `nft_sets`")
PCP = cfg.OptGroup("pcp", title="Mappings of a NAT or firewall that PCP controls, for the driver `pcp`")

AGENT_OPTIONS = [
    cfg.HostDomainOpt(
        "host",
        default=socket.gethostname(),
        sample_default="<the host's name>",
        help="Name of this host among the agents. Has to be the name that the hypervisors call it by; in OpenStack the "
        "same as [DEFAULT] host of nova.conf.",
    ),
    cfg.StrOpt(
        "driver",
        default="linux_conntrack",
        help="Firewall driver, a name of the entry points `sami.drivers`; `sami driver list` shows them. Change it "
        "when the guests' firewall of this host is not the kernel's.",
    ),
    cfg.ListOpt(
        "further_drivers",
        default=[],
        help="Drivers of what else this host keeps of its guests, beside the firewall's own: `nft_sets`, `pcp`, those "
        "of other packages, and last of all `deposit`, which keeps what only other hosts' devices know of. What one of "
        "them cannot do costs a migration that driver's kinds and nothing else. A kind that several carry is the "
        "first one's.",
    ),
    cfg.IntOpt(
        "capacity",
        min=1,
        help="Flows that the firewall may hold at the most, where that is to be less than it could: what is beyond it "
        "is not imported, and named. The firewall's own limit by default. A driver of another package has to know of "
        "it: it is made with `capacity=N` then.",
    ),
    cfg.StrOpt(
        "scopes",
        default="static",
        help="Scope finder, a name of the entry points `sami.scopes`: what knows where a port's state lives here. "
        "`bridge_iptables`, `routed_nftables`, `ovs`, `neutron_dvr` and `ovn` ask this host's firewall and need no "
        "file, `static` reads one. The documentation says which is for which of Neutron's drivers.",
    ),
    cfg.StrOpt(
        "scope_file",
        default="/etc/sami/ports.json",
        help="For the scope finder `static`: a JSON file that lists the ports of this host. Replace it by renaming.",
    ),
    cfg.BoolOpt(
        "trust_guest_xml",
        default=False,
        help="For the scope finders `bridge_iptables`, `routed_nftables`, `ovs` and `neutron_dvr`: believe the "
        "addresses that a guest's libvirt XML gives its ports even where ports share a conntrack zone and this host's "
        "own firewall does not say whose they are. The XML comes with the guest, so the host that it comes from can "
        "then have flows admitted for any address of that zone. In a zone of the port's own it is believed without "
        "this.",
    ),
    cfg.ListOpt(
        "translations",
        default=[],
        item_type=types.IPAddress(),
        help="Addresses that this host's NAT translates those of any guest to and from, such as that of a masquerade. "
        "A flow with a NAT to another address is refused, unless the scope finder `static` names it for the port. For "
        "the flow's peer the address has to be where the guest is, so it is the same on all hosts, or goes along.",
    ),
    cfg.ListOpt(
        "domains",
        default=[],
        help="Names of the other administrative domains with which guests are exchanged: other regions, other owners. "
        "Each has a group of options, [domain:NAME]. Hosts of no such domain are of this host's own.",
    ),
    cfg.StrOpt(
        "journal",
        default="/var/lib/sami/journal.sqlite",
        help="Path of the journal. It has to be on a disk that survives a restart of the host.",
    ),
    _number(
        "journal_days",
        default=_RETENTION.days,
        min=0.01,
        help="Days for which the journal keeps migrations that have ended, with their reports.",
    ),
    cfg.IntOpt(
        "journal_mebibytes",
        default=_RETENTION.octets // MEBIBYTE,
        min=1,
        help="Room that the journal may take. Where there is not enough, the migrations that ended first are forgotten "
        "before their time; those under way never are. A migration under way keeps its flows there, about 35 octets "
        "each for IPv4 before compression.",
    ),
    cfg.StrOpt(
        "socket",
        default="/run/sami/agent.sock",
        help="Path of the unix socket on which this host's hooks tell of migrations. The hook's own configuration, "
        "/etc/sami/libvirt-hook.conf, has to name the same.",
    ),
    cfg.StrOpt(
        "socket_mode",
        default="0600",
        regex=r"^0?[0-7]{3}$",
        help="Mode of that socket, in octal. Who may write to it may tell of migrations. Root always may, and libvirt "
        "calls its hooks as root; so change it, together with socket_group, only where somebody else has to write to "
        "it: nova-compute with the notification driver (0660), or a libvirtd that runs as somebody else.",
    ),
    cfg.StrOpt(
        "socket_group",
        help="Group that owns that socket, by name or number. The agent's own group by default.",
    ),
    cfg.ListOpt(
        "socket_users",
        default=[],
        help="Users, by name or number, who may tell of migrations on that socket besides root and the agent's own; "
        "the kernel says who it is. Empty: whoever may open it. Where socket_group admits more than those who are "
        "meant, name nova's or libvirt's user here.",
    ),
    cfg.IntOpt(
        "enterprise_number",
        default=_DEFAULTS.enterprise,
        min=1,
        max=0xFFFFFFFF,
        help="IANA private enterprise number under which our own information elements travel. Equal on all hosts. The "
        "default is the number that RFC 5612 reserves for documentation; change it to your own to write files that "
        "other software keeps apart.",
    ),
]

OVS_OPTIONS: list[cfg.Opt] = [
    cfg.StrOpt(
        "ovsdb_connection",
        default="unix:/run/openvswitch/db.sock",
        help="Where Open vSwitch's database answers, as of ovsdb(7): unix:FILE, or tcp:127.0.0.1:6640 as in Neutron's "
        "[ovs] ovsdb_connection. Beside the file are the sockets of the bridges; with tcp they are where ovs-ofctl "
        "looks by itself. Change it where Open vSwitch runs in a container that has another folder for them.",
    ),
    cfg.StrOpt(
        "integration_bridge",
        default="br-int",
        help="Name of the bridge that the guests' ports are in, as Neutron's [ovs] integration_bridge.",
    ),
]

DEPOSIT_OPTIONS: list[cfg.Opt] = [
    cfg.StrOpt("folder", default="/var/lib/sami/deposit", help="Where it is kept, in a file for each port."),
    cfg.IntOpt(
        "days",
        default=30,
        min=1,
        help="What no guest has taken with it for so many days is thrown away when the agent starts.",
    ),
]

LINUX_CONNTRACK_OPTIONS: list[cfg.Opt] = [
    cfg.BoolOpt(
        "accounting",
        default=False,
        help="Whether flows take along what this kernel counted of them (nf_conntrack_acct) and when they began "
        "(nf_conntrack_timestamp). Turn it on where guests go to firewalls that can be given these, which no Linux "
        "kernel is: there each flow is reported as degraded. A flow takes 156 octets then for IPv4 and 204 for IPv6, "
        "before compression.",
    ),
]

NFT_SETS_OPTIONS: list[cfg.Opt] = [
    cfg.ListOpt(
        "sets",
        default=[],
        help="The sets and maps of which a guest's elements go with it, each as [NAME=]FAMILY TABLE SET, such as "
        "`inet filter throttled`, or [NAME=]ipset SET. NAME is what both hosts call it, by default SET. An element is "
        "a guest's if one of "
        "the guest's addresses is in its key. Name sets that packets add to, whose elements mean the same on each "
        "host.",
    ),
]

PCP_OPTIONS: list[cfg.Opt] = [
    cfg.IPOpt(
        "server",
        default="127.0.0.1",
        help="Where the PCP server (RFC 6887) answers that controls the NAT or firewall of this host's guests, asked "
        "from the network namespace that a port's flows are in. It has to take mappings for third parties from this "
        "host (miniupnpd: pcp_allow_thirdparty) and to speak NAT-PMP too, as miniupnpd does.",
    ),
    cfg.ListOpt(
        "lease_files",
        default=[],
        help="The files in which that server keeps what it has, for PCP itself lists no mappings: miniupnpd's "
        "lease_file and, of the holes in its IPv6 firewall, lease_file6. {namespace} in a path stands for the name of "
        "the network namespace, where each has a server of its own. Without them the guests' mappings stay behind.",
    ),
    cfg.StrOpt(
        "device",
        help="Name of the device, where it serves several hosts. Hosts with the same name here have the same one: "
        "what it keeps of a guest that moves between them stays in it, and the report says so.",
    ),
]

OVN_OPTIONS: list[cfg.Opt] = [
    cfg.StrOpt(
        "ovn_sb_connection",
        help="Where OVN's southbound database answers, as Neutron's [ovn] ovn_sb_connection: tcp:ADDRESS:PORT or "
        "ssl:ADDRESS:PORT, several with commas. Without it the addresses of a guest's ports are those that OVN lets "
        "them send from on this host, and where OVN says none, those of the guest's libvirt XML: so it is with ports "
        "without port security, and may be with any port until the guest runs here. The XML has no allowed address "
        "pairs, so flows of a pair may be refused when the guest comes. With it all of these addresses come from OVN. "
        "Set it on all hosts where ports have allowed address pairs, or no port security.",
    ),
    cfg.StrOpt(
        "ovn_sb_private_key",
        help="PEM file with the private key for ssl:. All three files have to be named, or none.",
    ),
    cfg.StrOpt("ovn_sb_certificate", help="PEM file with the certificate for that key."),
    cfg.StrOpt("ovn_sb_ca_cert", help="PEM file with the certificate of the authority that the database's is of."),
]

MIGRATION_OPTIONS = [
    _number(
        "delta_seconds",
        default=_LIMITS.delta_seconds,
        min=0.01,
        help="Seconds between two looks for changes while memory is copied. Less makes the last look, in the guest's "
        "pause, smaller; more costs less processor time.",
    ),
    _number(
        "resync_seconds",
        default=_LIMITS.resync_seconds,
        min=1.0,
        help="Seconds between two whole exports while memory is copied. They find changes of entries that are older "
        "than the agent's start, which the kernel does not tell. Raise it when guests have hundreds of thousands of "
        "flows.",
    ),
    cfg.IntOpt(
        "hold_seconds",
        default=_LIMITS.hold_seconds,
        min=3,
        help="Seconds that an imported flow is kept at least while its guest is still on the way; renewed at a third "
        "of it. A flow may outlive its own timeout by this much after the guest's arrival.",
    ),
    _number(
        "open_seconds",
        default=_LIMITS.open_seconds,
        min=0.1,
        help="Seconds that the destination waits for the source's answer, and the source for its hypervisor's word "
        "that the guest leaves.",
    ),
    _number(
        "verdict_seconds",
        default=_LIMITS.verdict_seconds,
        min=0.0,
        help="Seconds that a migration's beginning waits on the destination for the source to say what flows there "
        "are. Without an answer the guest's policy decides about a risk that is not known; with the policy `proceed` "
        "the migration goes on, and the flows follow as soon as they can.",
    ),
    _number(
        "reservation_seconds",
        default=_LIMITS.reservation_seconds,
        min=1.0,
        help="Seconds for which the destination keeps the places in its firewall that it has promised to a guest's "
        "flows. Longer than your hypervisors wait before they copy memory: Nova waits up to 300 seconds for ports.",
    ),
    _number(
        "started_seconds",
        default=_DEFAULTS.started_seconds,
        min=0.0,
        help="Seconds that the start of the guest's empty shell on the destination is held up until all that the "
        "source had at first is in the firewall. Most guests' flows are there in a tenth of a second once the port has "
        "its zone. Raise it where the manager's agent gives the zone only after the start, as with Linux bridges, and "
        "small guests are not to run before it has: each of their migrations takes so much longer. libvirt's hook "
        "waits no longer than its own started_seconds (/etc/sami/libvirt-hook.conf): set that to a second more.",
    ),
    _number(
        "zone_seconds",
        default=_LIMITS.zone_seconds,
        min=0.1,
        help="Seconds that the destination waits for the port's zone after the guest's start there, and for the router "
        "that translates for it where the source had one. Raise it where the network's agent is slow.",
    ),
    _number(
        "arrival_limit",
        default=_LIMITS.arrival_seconds,
        min=1.0,
        help="Seconds after which the source purges the flows of a guest that left although nobody said that it "
        "arrived. Raise it where the agents' broker may be away for longer.",
    ),
    _number(
        "late_import_seconds",
        default=_DEFAULTS.late_import_seconds,
        min=0.0,
        help="Seconds after such a purge for which an agent of the destination that was away may still have the flows, "
        "from the source's journal. Later they could outlive a firewall rule that was removed meanwhile.",
    ),
    cfg.BoolOpt(
        "remove_unadmitted",
        default=_DEFAULTS.remove_unadmitted,
        help="Whether the destination removes, by name, flows that a peer began while the guest ran already and its "
        "port had no zone yet, and that the source did not have. The network's agent may not have written the port's "
        "rules by then, so nobody has admitted them. They are named in the report in any case.",
    ),
    _number(
        "watch_seconds",
        default=_LIMITS.watch_seconds,
        min=0.0,
        help="Seconds after which the source, having purged a guest's flows, looks for entries that packets of peers "
        "have made there since the guest was paused, and removes them by name. Raise it where the network takes longer "
        "to learn where a guest is.",
    ),
    _number(
        "session_seconds",
        default=_LIMITS.session_seconds,
        min=10.0,
        help="Seconds after which a migration's session ends whatever state it is in. Longer than your longest "
        "migration.",
    ),
    _number(
        "headroom_percent",
        default=_DEFAULTS.headroom_percent,
        min=0.0,
        max=100.0,
        help="Share of the firewall's table, in percent, that imports leave free. A kernel whose table is full drops "
        "entries of anybody. Flows for which there is no place are refused by name: those that were seen one way only "
        "before the others, and of these the ones that have less time left.",
    ),
    cfg.IntOpt(
        "batch_flows",
        default=_DEFAULTS.batch_flows,
        min=1,
        max=100_000,
        help="Flows in one message at the most; about 35 octets each for IPv4 before compression.",
    ),
    cfg.IntOpt(
        "window",
        default=_DEFAULTS.window,
        min=1,
        max=64,
        help="Messages of one session that are under way at a time. More hides the broker's latency and costs memory.",
    ),
    _number(
        "call_seconds",
        default=_DEFAULTS.call_seconds,
        min=0.1,
        help="Seconds to wait for the other agent to take a message before it is sent again. Less than "
        "verdict_seconds, so that what was lost with an agent that was killed is there again before anybody decides "
        "without it.",
    ),
    _number(
        "message_seconds",
        default=_DEFAULTS.message_seconds,
        min=0.1,
        help="Seconds during which a message that is not taken is still sent again after its session has ended. As "
        "long as the session lasts, it is sent again without limit.",
    ),
]


POLICY = cfg.OptGroup("policy", title="Which guests may come although flows would be lost")
POLICY_OPTIONS: list[cfg.Opt] = [
    cfg.StrOpt(
        "default",
        default="proceed",
        help="Policy, a name of the entry points `sami.policies`. `proceed`: a guest comes, whatever becomes of its "
        "flows. `partial`: it comes if at least partial_percent of them can be carried. `veto`: only if it is known "
        "that all of them come along as they are. `ask`: where something would be lost, an operator decides with `sami "
        "session approve` or `refuse`. A refusal stops the migration only where libvirt's hook is installed on this "
        "host, with ``veto = yes`` in its own configuration.",
    ),
    cfg.DictOpt(
        "guests",
        default={},
        help="Policies of single guests, UUID:POLICY; they come before those of domains. The policy `off` means that "
        "this host does nothing for the guest's flows; set it on all hosts that the guest may be on.",
    ),
    cfg.ListOpt(
        "excluded_flavors",
        default=[],
        help="Names of Nova's flavors. This host does nothing for the flows of guests that are of one of them, by what "
        "their descriptions say; set it on all hosts that they may be on.",
    ),
    _number(
        "partial_percent",
        default=90.0,
        min=0.0,
        max=100.0,
        help="For the policy `partial`: the least share of a guest's flows, in percent, that has to be carried.",
    ),
    _number(
        "ask_seconds",
        default=_LIMITS.ask_seconds,
        min=0.1,
        max=550.0,
        help="For the policy `ask`: seconds that the migration waits for the operator. The hook waits only for as long "
        "as its own verdict_seconds say: set them to verdict_seconds of [migration] and this together.",
    ),
    cfg.StrOpt(
        "silence_means",
        default=_LIMITS.silence_means.value,
        choices=[Verdict.PROCEED.value, Verdict.VETO.value],
        help="For the policy `ask`: what counts when the operator says nothing in time.",
    ),
]


BOUNDS = cfg.OptGroup("bounds", title="How much of others is taken")
BOUNDS_OPTIONS: list[cfg.Opt] = [
    cfg.IntOpt(
        "sessions",
        default=_BOUNDS.sessions,
        min=1,
        help="Migrations, of guests that come and of guests that leave, that are under way at a time. The flows of a "
        "guest that is one too many are not carried; the guest moves all the same.",
    ),
    cfg.IntOpt(
        "handshakes",
        default=_BOUNDS.handshakes,
        min=1,
        help="Hosts that call at a time and have not yet shown who they are. The others are asked to call again, which "
        "they do by themselves.",
    ),
    _number(
        "handshakes_per_second",
        default=_BOUNDS.handshakes_per_second,
        min=0.1,
        help="Likewise, calls in a second, in the long run; as many as `handshakes` may come at once. One costs about "
        "two milliseconds of a processor.",
    ),
    _number(
        "handshake_seconds",
        default=_BOUNDS.handshake_seconds,
        min=0.1,
        help="Seconds that a host which calls has to show who it is and what it wants. Raise it where the broker is "
        "slow.",
    ),
    cfg.IntOpt(
        "handshake_octets",
        default=_BOUNDS.handshake_octets,
        min=1 << 14,
        help="Octets that are kept of such a host while something that comes before them is missing.",
    ),
    cfg.IntOpt(
        "streams",
        default=_BOUNDS.streams,
        min=1,
        max=64,
        help="TLS streams of one session, each of which follows one that broke. Who can break more than that can as "
        "well keep all messages from arriving.",
    ),
    cfg.IntOpt(
        "session_octets",
        default=_BOUNDS.session_octets,
        min=32 * MEBIBYTE,
        help="Octets that are kept of one session in each of three places: what came too early, and what came and is "
        "not handled yet, of which a peer is asked to send more later; and what was sent and is not acknowledged, with "
        "more of which the peer counts as lost.",
    ),
    cfg.IntOpt(
        "unpacked_octets",
        default=_BOUNDS.unpacked_octets,
        min=MEBIBYTE,
        help="Octets that one message's flows may unpack to. More than batch_flows of the other hosts takes, which is "
        "about 60 octets a flow for IPv6, and 204 with their accounting.",
    ),
    cfg.IntOpt(
        "hooks",
        default=_BOUNDS.hooks,
        min=1,
        help="Connections to the agent's socket at a time. One more is told so, and its migration goes on without a "
        "word to the agent.",
    ),
    _number(
        "hook_seconds",
        default=_BOUNDS.hook_seconds,
        min=0.1,
        help="Seconds that a hook has to say a whole line, or to take its answer. What the agent does in between does "
        "not count.",
    ),
]


LIBVIRT = cfg.OptGroup("libvirt", title="This host's libvirt")
LIBVIRT_OPTIONS: list[cfg.Opt] = [
    cfg.StrOpt(
        "uri",
        default="",
        help="libvirt's connection URI, qemu:///system for most hosts. With it the agent hears of migrations and asks "
        "whether a guest is about to leave, and it notes in each guest's description which host it is on. So the "
        "connection has to be one that may write. Without it only hooks tell the agent of "
        "migrations, and they have to name the source. Needs the extra `libvirt`.",
    ),
]


TLS = cfg.OptGroup("tls", title="Who this host is, and whom it believes")
TLS_OPTIONS: list[cfg.Opt] = [
    cfg.StrOpt(
        "certificate",
        default="/etc/sami/tls/host.pem",
        help="Path of this host's certificate, PEM, followed by those between it and its authority if there are any. "
        "Among its subject's alternative names it has the URI sami://NAME with the name of [agent] host. `sami pki` "
        "makes such certificates for those who have no authority of their own. A file that is replaced counts for the "
        "sessions that begin afterwards; nothing has to be restarted.",
    ),
    cfg.StrOpt(
        "key",
        default="/etc/sami/tls/host.key",
        help="Path of the certificate's key, PEM without a password. Nobody but the agent may read it (mode 0600).",
    ),
    cfg.StrOpt(
        "authorities",
        default="/etc/sami/tls/ca.pem",
        help="Path of the certificates of the authorities, PEM. Each host that has a certificate of one of them can "
        "take part.",
    ),
    cfg.StrOpt(
        "revoked",
        default="/etc/sami/tls/crl.pem",
        help="Path of the authorities' lists of revoked certificates (CRL), PEM, one of each authority. A list that is "
        "out of date lets no session begin. Empty: there is none, and nothing is ever revoked.",
    ),
]


DOMAIN_OPTIONS: list[cfg.Opt] = [
    cfg.ListOpt(
        "hosts",
        default=[],
        help="Patterns of the names of the domain's hosts, such as ``*.west.example``. Only they speak for it, and for "
        "no other. A host that several domains have is of the first in [agent] domains.",
    ),
    cfg.StrOpt(
        "transport_url",
        default="",
        secret=True,
        help="The broker at which the domain's hosts listen, as [DEFAULT] transport_url. It needs an account for this "
        "host there, and theirs one here. Empty: they listen at this host's own broker.",
    ),
    cfg.StrOpt(
        "authorities",
        help="Path of the certificates of the domain's authorities, PEM. They vouch for the domain's hosts and for "
        "nobody else. Has to be set.",
    ),
    cfg.StrOpt(
        "revoked",
        default="",
        help="Path of these authorities' lists of revoked certificates (CRL), PEM. Empty: there is none.",
    ),
    cfg.ListOpt(
        "address_map",
        default=[],
        help="Where guests, and hosts they talk to, have other addresses here than there: pairs THEIRS=OURS of "
        "prefixes of one length, such as 10.1.0.0/24=10.9.0.0/24. An incoming flow is rewritten wherever such an "
        "address stands in it. An address there that is of a prefix of OURS is refused by name.",
    ),
    cfg.BoolOpt(
        "peers_follow",
        default=False,
        help="Something between these domains and the guests' peers, such as a stateless translation of prefixes, has "
        "peers go on to see a renumbered guest by the address that they know. Without it a flow whose peer would see "
        "another address is refused by name: its peer would answer nothing. What a flow's own NAT hides from the peer "
        "needs no such thing.",
    ),
    cfg.ListOpt(
        "kinds_in",
        default=["*"],
        help="Patterns of the kinds of flows that are taken from the domain. `sami driver list` shows the kinds.",
    ),
    cfg.StrOpt(
        "policy",
        default="",
        help="Policy for guests that come from the domain, as [policy] default. Empty: that one.",
    ),
    cfg.ListOpt(
        "kinds_out",
        default=["*"],
        help="Patterns of the kinds of flows that are given to the domain. What is not given is purged here with the "
        "rest when the guest has left, and the report names it.",
    ),
]


NOTIFICATIONS = cfg.OptGroup("oslo_messaging_notifications", title="What other programs are told of migrations")
NOTIFICATION_OPTIONS: list[cfg.Opt] = [
    cfg.MultiStrOpt(
        "driver",
        default=[],
        help="How notifications of migrations are sent: `messagingv2` to the broker, `log` into the agent's log. "
        "Nothing is sent without one. The group is oslo.messaging's, which has more options.",
    ),
    cfg.StrOpt(
        "transport_url",
        secret=True,
        help="The broker to which they are sent. That of [DEFAULT] transport_url by default.",
    ),
    cfg.ListOpt(
        "topics",
        default=["notifications"],
        help="Topics on which they are sent; a queue's name is a topic's with the priority, as notifications.info.",
    ),
]
"""Told, and not registered: oslo.messaging does that."""


def retention(conf: cfg.ConfigOpts) -> Retention:
    """The options of the journal's size and age."""
    return Retention(conf.agent.journal_days, conf.agent.journal_mebibytes * MEBIBYTE)


def driver_options(conf: cfg.ConfigOpts) -> dict[str, dict[str, object]]:
    """The drivers by name, in their order, each with what it is made with.

    :raises ConfigurationError: one is named twice.
    """
    names = [conf.agent.driver, *conf.agent.further_drivers]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"[agent] further_drivers: one of {', '.join(names)} is named twice")
    made: dict[str, dict[str, object]] = {name: {} for name in names}
    if conf.agent.capacity is not None:
        made[conf.agent.driver]["capacity"] = conf.agent.capacity
    if "deposit" in made:
        made["deposit"] |= {"folder": conf.deposit.folder, "days": conf.deposit.days}
    if "linux_conntrack" in made:
        made["linux_conntrack"]["accounting"] = conf.linux_conntrack.accounting
    if "nft_sets" in made:
        made["nft_sets"]["sets"] = conf.nft_sets.sets
    if "pcp" in made:
        made["pcp"] |= {name: conf.pcp[name] for name in ("server", "lease_files", "device")}
    return made


def domains(conf: cfg.ConfigOpts) -> tuple[Domain, ...]:
    """The other domains, in the order of [agent] domains.

    :raises ConfigurationError: an option of one is missing or does not do; says which.
    """
    return tuple(_domain(conf, name) for name in conf.agent.domains)


def _domain(conf: cfg.ConfigOpts, name: str) -> Domain:
    # Only who has domains needs numpy here: this module is imported by commands that are to start quickly.
    from sami_plugin.model.address_map import AddressMap
    from sami_plugin.model.domain import Domain

    group = f"domain:{name}"
    conf.register_opts(DOMAIN_OPTIONS, group=group)
    values, own = conf[group], tls_files(conf)
    for option in ("hosts", "authorities"):
        if not values[option]:
            raise ConfigurationError(f"[{group}] {option}: has to be set")
    try:
        address_map = AddressMap.parse(values.address_map)
    except ConfigurationError as error:
        raise ConfigurationError(f"[{group}] address_map: {error}") from error
    made = Domain(
        name=name,
        hosts=tuple(values.hosts),
        credentials=Files(
            own.certificate, own.key, Path(values.authorities), Path(values.revoked) if values.revoked else None
        ),
        transport_url=values.transport_url,
        address_map=address_map,
        peers_follow=values.peers_follow,
        kinds_in=tuple(values.kinds_in),
        kinds_out=tuple(values.kinds_out),
        policy=values.policy,
    )
    if made.has(conf.agent.host):
        raise ConfigurationError(f"[{group}] hosts: {', '.join(made.hosts)} has this host, {conf.agent.host}, itself")
    return made


def tls_files(conf: cfg.ConfigOpts) -> Files:
    """The options of [tls]."""
    values = conf.tls
    revoked = Path(values.revoked) if values.revoked else None
    return Files(Path(values.certificate), Path(values.key), Path(values.authorities), revoked)


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """For oslo-config-generator."""
    return [
        *_GROUPS,
        (cfg.OptGroup("domain:name", title="A domain of [agent] domains; one such group each"), DOMAIN_OPTIONS),
        (NOTIFICATIONS, NOTIFICATION_OPTIONS),
    ]


_GROUPS: list[tuple[cfg.OptGroup, list[cfg.Opt]]] = [
    (AGENT, AGENT_OPTIONS),
    (OVS, OVS_OPTIONS),
    (OVN, OVN_OPTIONS),
    (DEPOSIT, DEPOSIT_OPTIONS),
    (LINUX_CONNTRACK, LINUX_CONNTRACK_OPTIONS),
    (NFT_SETS, NFT_SETS_OPTIONS),
    (PCP, PCP_OPTIONS),
    (MIGRATION, MIGRATION_OPTIONS),
    (POLICY, POLICY_OPTIONS),
    (TLS, TLS_OPTIONS),
    (LIBVIRT, LIBVIRT_OPTIONS),
    (BOUNDS, BOUNDS_OPTIONS),
]


def register(conf: cfg.ConfigOpts) -> None:
    """Makes the options known to `conf`; those of a domain become known with it."""
    for group, options in _GROUPS:
        conf.register_group(group)
        conf.register_opts(options, group)


def settings(conf: cfg.ConfigOpts) -> Settings:
    """The options of a migration as plain values. The kinds of the installed packages have to be known (`load_kinds`).

    :raises ConfigurationError: the enterprise number is another's; `cfg.Error` and ValueError if a value is none.
    """
    values = conf.migration
    limits = Limits(
        delta_seconds=values.delta_seconds,
        resync_seconds=values.resync_seconds,
        hold_seconds=values.hold_seconds,
        open_seconds=values.open_seconds,
        zone_seconds=values.zone_seconds,
        arrival_seconds=values.arrival_limit,
        watch_seconds=values.watch_seconds,
        session_seconds=values.session_seconds,
        verdict_seconds=values.verdict_seconds,
        ask_seconds=conf.policy.ask_seconds,
        silence_means=Verdict(conf.policy.silence_means),
        reservation_seconds=values.reservation_seconds,
    )
    return Settings(
        limits=limits,
        bounds=Bounds(**{option.dest: conf.bounds[option.dest] for option in BOUNDS_OPTIONS}),
        batch_flows=values.batch_flows,
        window=values.window,
        call_seconds=values.call_seconds,
        message_seconds=values.message_seconds,
        started_seconds=values.started_seconds,
        headroom_percent=values.headroom_percent,
        late_import_seconds=values.late_import_seconds,
        remove_unadmitted=values.remove_unadmitted,
        enterprise=_enterprise(conf.agent.enterprise_number),
        translations=tuple(map(netaddr.IPAddress, conf.agent.translations)),
    )


def _enterprise(number: int) -> int:
    try:
        information_elements.check_enterprise(number)
    except ConfigurationError as error:
        raise ConfigurationError(f"[agent] enterprise_number: {error}") from error
    return number
