"""What guests and their peers do with connections while all else happens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from sami_plugin.model.flows import FlowStatus
from sami_plugin.testing.simulator.guests import KINDS, Flow, Guest, Port, addresses_of, conversation, turned

if TYPE_CHECKING:
    from sami_plugin.drivers.memory import Entry
    from sami_plugin.testing.simulator.firewall import GuardedDevice
    from sami_plugin.testing.simulator.hypervisor import Script
    from sami_plugin.testing.simulator.world import World

KEEPALIVE_SECONDS = 1.6
CLOSED_SECONDS = 120
"""As the kernel has it for TIME_WAIT."""


class Traffic:
    """Makes, changes, renews and ends flows in the firewall of the host where their guest is."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = world.random
        self._numbers = 0

    # What the world asks for.

    def begin(self, port: Port, host: str) -> None:
        """A connection that is there before anything else."""
        self._make(port, host)

    def between(self, one: Port, other: Port, host: str) -> None:
        """A connection between two guests of a host: one entry."""
        self._numbers += 1
        kind = self._random.choice(("tcp-ipv4", "tcp-ipv6"))
        family = 1 if kind.endswith("6") else 0
        ends = addresses_of(one.number)[family], addresses_of(other.number)[family]
        self._enter(Flow(conversation(kind, *ends, self._numbers), (one, other)), host, one.zones[host])

    def foreign(self, host: str, zone: int) -> None:
        """A connection of nobody that is known."""
        self._numbers += 1
        flow = Flow(conversation("tcp-ipv4", "203.0.113.5", "198.51.100.77", self._numbers), ())
        self._enter(flow, host, zone)

    def busy(self, guest: Guest, seconds: float) -> None:
        """Something happens to the guest's flows in the next seconds."""
        for _ in range(self._random.randint(0, self._world.mix.traffic)):
            self._world.after(self._random.random() * seconds, partial(self.happen, guest))

    def keepalive(self) -> Script:
        """Packets go on in whatever connection is not silent."""
        while True:
            yield KEEPALIVE_SECONDS
            for guest in self._world.guests.values():
                if guest.runs:
                    self.renew(guest)

    def renew(self, guest: Guest) -> None:
        """A packet in each of the guest's connections."""
        host = guest.place
        assert host is not None
        now = self._world.now
        for flow in guest.flows:
            if flow.is_live and flow.is_renewed and flow.expires_at > now:
                entry = self._entry(flow, host)
                is_there = entry is not None and entry.expires > now
                if not is_there and flow.expires_at <= now + 1.0:
                    continue  # timeouts travel in whole seconds
                flow.expires_at = now + flow.conversation.lifetime
                if entry is not None and is_there:
                    entry.expires = flow.expires_at

    def happen(self, guest: Guest) -> None:
        """One thing, where the guest runs."""
        host = guest.place
        if host is None or guest.is_paused or not guest.ports:
            return
        choice = self._random.random()
        if choice < 0.35:
            port = self._random.choice(guest.ports)
            if host in port.zones:
                self._make(port, host)
            return
        live = [flow for flow in guest.flows if flow.is_open and self._is_whole(flow, host)]
        if not live:
            return
        flow = self._random.choice(live)
        entry = self._entry(flow, host)
        if entry is None or entry.expires <= self._world.now or entry.row["flowMark"] != flow.mark:
            return
        if choice < 0.65:
            flow.mark += 1
            flow.changed_at = self._world.now
            entry.row["flowMark"] = flow.mark
            self._world.tell(host, f"{flow.conversation.name} gets mark {flow.mark}")
            self._device(host).changed(self._place(flow, host), entry)
        elif choice < 0.9:
            self._world.tell(host, f"{flow.conversation.name} ends")
            flow.is_live = False
            flow.ended_at = self._world.now
            self._device(host).drop(self._place(flow, host), entry)
            if choice < 0.7 and len(flow.owners) == 1:  # the same tuple is used again
                self._world.tell(host, f"{flow.conversation.name} begins again")
                again = Flow(flow.conversation, flow.owners, flow.mark + 1, changed_at=flow.ended_at)
                self._enter(again, host, flow.owners[0].zones[host])
        else:
            flow.is_renewed = False
            if flow.conversation.name.startswith("tcp"):
                self._close(flow, host, entry)

    def _close(self, flow: Flow, host: str, entry: Entry) -> None:
        """Both ends have said all: the firewall keeps it only for what may still be under way."""
        self._world.tell(host, f"{flow.conversation.name} closes")
        flow.expires_at = flow.closes_at = entry.expires = self._world.now + CLOSED_SECONDS
        protocol = entry.template.protocol
        assert protocol.states is not None
        assert protocol.state_field is not None
        entry.row[protocol.state_field] = protocol.states["TIME_WAIT"]
        self._device(host).changed(self._place(flow, host), entry)

    def first_packets(self, guest: Guest) -> None:
        """Of a guest that has just come: what its firewall does not know yet gets an entry without a past."""
        host = guest.place
        assert host is not None
        if self._random.random() < 0.3:
            for port in guest.ports:
                if host in port.zones:
                    self._meet(guest, host, port)

    def late_packets(self, guest: Guest, host: str) -> None:
        """Of peers that do not know yet that the guest has left the host."""
        for _ in range(self._random.randint(1, 2)):
            port = self._random.choice(guest.ports)
            self._world.after(self._random.random() * 0.8, partial(self._late, guest, host, port))

    def _late(self, guest: Guest, host: str, port: Port) -> None:
        # What peers make before the source has sent its last changes is told with them, and nobody can tell that apart.
        is_sending = any(
            one.guest == guest.id and one._state() in ("waiting", "offered", "copying", "following")
            for one in self._world.sessions_at(host)
        )
        if guest.place != host and host in port.former and not is_sending:
            self._meet(guest, host, port)

    def _meet(self, guest: Guest, host: str, port: Port) -> None:
        flows = [one for one in guest.flows if one.is_open and one.owners[0] is port and not one.is_between_guests]
        if not flows:
            return
        flow = self._random.choice(flows)
        device, zone, now = self._device(host), port.former[host], self._world.now
        found = device.find(zone, flow.conversation.original)
        if found is not None and found.expires > now:
            return
        if device.has_tuple(zone, flow.conversation.original) or self._is_full(device):
            return
        met = flow.conversation
        if self._random.random() < 0.5:  # the peer's packet came first
            met = turned(met) or met
            self._world.flows.setdefault(met.original, flow)
        entry = met.entry(now + met.lifetime, 0)
        entry.row["conntrackStatus"] = FlowStatus.CONFIRMED
        self._world.tell(host, f"a packet of {met.name} makes an entry")
        device.create((None, zone), entry)
        device.by_packets.add(entry.flow_id)

    def clean(self, guest: Guest, host: str) -> None:
        """The network's own agent deletes the entries of a port that is about to leave."""
        if not guest.is_paused_by_job and guest.place == host:
            return
        if guest.place != host and host not in guest.jobs:
            return
        device = self._device(host)
        for flow in guest.flows:
            if flow.is_between_guests:
                continue
            zone = flow.owners[0].former.get(host)
            entry = None if zone is None else device.find(zone, flow.conversation.original)
            if entry is not None and zone is not None:
                self._world.tell(host, f"the network's agent deletes {flow.conversation.name}")
                flow.is_cleaned = flow.was_cleaned = True
                device.drop((None, zone), entry)

    # How it is done.

    def _make(self, port: Port, host: str) -> None:
        self._numbers += 1
        kind = self._random.choice(KINDS)
        own = addresses_of(port.number)[1 if kind.endswith("6") else 0]
        peer = "2001:db8:1::9" if kind.endswith("6") else "198.51.100.9"
        ends = (own, peer) if self._random.random() < 0.7 else (peer, own)
        flow = Flow(conversation(kind, *ends, self._numbers), (port,))
        if self._enter(flow, host, port.zones[host]):
            self._world.tell(host, f"{flow.conversation.name} begins")

    def _enter(self, flow: Flow, host: str, zone: int) -> bool:
        device = self._device(host)
        if self._is_full(device):
            return False
        for port in flow.owners:
            port.guest.flows = [one for one in port.guest.flows if one.conversation is not flow.conversation]
            port.guest.flows.append(flow)
        self._world.flows[flow.conversation.original] = flow
        flow.expires_at = self._world.now + flow.conversation.lifetime
        entry = flow.conversation.entry(flow.expires_at, flow.mark)
        device.create((None, zone), entry)
        return True

    @staticmethod
    def _is_full(device: GuardedDevice) -> bool:
        return device.capacity is not None and device.held >= device.capacity

    def _is_whole(self, flow: Flow, host: str) -> bool:
        """Whether all ends are here, and were nowhere else.

        A connection between guests of two hosts is two entries; one that changes while both ends move is told by both.
        Such are left alone.
        """
        return host in flow.owners[0].zones and (
            not flow.is_between_guests
            or all(port.guest.place == host and not port.guest.visited - {host} for port in flow.owners)
        )

    def _device(self, host: str) -> GuardedDevice:
        return self._world.devices[host]

    def _place(self, flow: Flow, host: str) -> tuple[None, int]:
        return None, flow.owners[0].zones[host]

    def _entry(self, flow: Flow, host: str) -> Entry | None:
        zone = flow.owners[0].zones.get(host)
        return None if zone is None else self._device(host).find(zone, flow.conversation.original)
