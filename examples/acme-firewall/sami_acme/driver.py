"""A driver for ACME's firewalls: it speaks to one by REST, and to sami_plugin in batches of flows."""

import json
import os
import urllib.request

import numpy as np

from sami_acme.kinds import BANS
from sami_plugin.drivers.base import Capabilities, FlowDriver
from sami_plugin.errors import DeviceFailed, UndeclaredAbility
from sami_plugin.model.flows import BARRED, TEMPLATES, Batch, Omitted, has_end_in, turned_round
from sami_plugin.model.keys import KeyIndex
from sami_plugin.model.results import Outcome, Reason, results
from sami_plugin.model.risk import MARKS

KINDS = frozenset({"tcp-ipv4", "tcp-ipv6", "udp-ipv4", "udp-ipv6", *(ban.name for ban in BANS)})
ENDS = {"from": "source", "to": "destination"}
SECONDS = 10.0


class AcmeDriver(FlowDriver):
    def __init__(self, url=None, capacity=None):
        """`capacity` is [agent] capacity, where that is set; the firewall's address is in the agent's environment."""
        self._url = url or os.environ.get("ACME_URL", "http://127.0.0.1:8089")
        self._capacity = capacity

    def _ask(self, method, path, said=None):
        body = None if said is None else json.dumps(said).encode()
        try:
            request = urllib.request.Request(self._url + path, body, method=method)
            with urllib.request.urlopen(request, timeout=SECONDS) as told:
                return json.load(told)
        except (OSError, ValueError) as error:
            raise DeviceFailed(f"the firewall at {self._url}: {error}; look whether it runs") from error

    def capabilities(self, scope=None):
        told = self._ask("GET", "/")
        capacity = min(told["capacity"], self._capacity or told["capacity"])
        return Capabilities(KINDS, False, capacity, told["in_use"], told["serial"], frozenset({MARKS}))

    def watch(self, scope):
        raise UndeclaredAbility("ACME's firewalls tell no changes")

    def _held(self, scope, template):
        """All flows of this kind in the scope's zones, whosever they are."""
        zones = scope.zones if template.name in KINDS else {}
        parts = [_rows(template, role, self._ask("GET", f"/zones/{zone}")) for role, zone in zones.items()]
        return Batch.joined(template, parts)

    def _by_zone(self, scope, batch):
        for role, zone in scope.zones.items():
            rows = batch.rows[batch.rows["zoneRole"] == int(role)]
            if len(rows):
                yield f"/zones/{zone}", Batch(batch.template, rows)

    def export(self, scope):
        for name in sorted(KINDS):
            held = self._held(scope, TEMPLATES[name])
            own = held.take(scope.owns(held)) if scope.is_shared else held
            is_barred = _is_barred(scope, own)
            if is_barred.any():
                yield Omitted(BARRED, int(is_barred.sum()))
            if not is_barred.all():
                yield own.take(~is_barred)

    def insert(self, scope, batch):
        if batch.template.name not in KINDS:
            return results(len(batch), Outcome.REFUSED, Reason.NOT_DECLARED)
        made = results(len(batch))
        is_zoned = scope.has_zone_of(batch)
        is_barred = _is_barred(scope, batch)
        is_theirs = has_end_in(batch, scope.neighbours) & scope.is_shared
        for reason, which in (
            (Reason.LOCAL_PORTS_OWN, is_theirs),
            (Reason.BARRED, is_barred),
            (Reason.FOREIGN_ADDRESS, ~has_end_in(batch, scope.addresses)),
            (Reason.INVALID, ~is_zoned),
        ):
            made["outcome"][which], made["reason"][which] = Outcome.REFUSED, reason
        there = KeyIndex(self._held(scope, batch.template))
        is_there = (there.find(batch) >= 0) | (there.find(turned_round(batch)) >= 0)
        is_present = is_theirs & is_there & is_zoned
        made["outcome"][is_present], made["reason"][is_present] = Outcome.PRESENT, Reason.NONE
        for path, part in self._by_zone(scope, batch.take(made["outcome"] == Outcome.IMPORTED)):
            self._ask("POST", path, _flows(part))
        return made

    def read_back(self, scope, batch):
        held = self._held(scope, batch.template)
        at = KeyIndex(held).find(batch)
        rows = batch.template.empty(len(batch))
        rows[at >= 0] = held.rows[at[at >= 0]]
        return Batch(batch.template, rows), at >= 0

    def renew(self, scope, batch):
        found, is_there = self.read_back(scope, batch)
        made = results(len(batch), Outcome.ABSENT)
        is_ours = is_there & _may_change(scope, found)
        made["outcome"][is_there], made["outcome"][is_ours] = Outcome.REFUSED, Outcome.IMPORTED
        made["reason"][is_there & ~is_ours] = Reason.LOCAL_PORTS_OWN
        found.rows["remainingTimeoutSeconds"] = batch.rows["remainingTimeoutSeconds"]
        for path, part in self._by_zone(scope, found.take(is_ours)):
            ids, seconds = part.rows["flowId"].tolist(), part.rows["remainingTimeoutSeconds"].tolist()
            self._ask("PATCH", path, dict(zip(ids, seconds, strict=True)))
        return made

    def remove(self, scope, identities):
        made = results(len(identities), Outcome.ABSENT)
        for template in (TEMPLATES[name] for name in KINDS):
            if template.key != identities.template.key:
                continue
            held = self._held(scope, template)
            at = KeyIndex(held).find(identities)
            places = np.flatnonzero(at >= 0)
            found, ids = held.take(at[places]), identities.rows["flowId"][places]
            is_meant, is_ours = (ids == 0) | (ids == found.rows["flowId"]), _may_change(scope, found)
            theirs, ours = places[is_meant & ~is_ours], places[is_meant & is_ours]
            made["outcome"][theirs], made["reason"][theirs] = Outcome.REFUSED, Reason.LOCAL_PORTS_OWN
            made["outcome"][ours] = Outcome.REMOVED
            for path, part in self._by_zone(scope, found.take(is_meant & is_ours)):
                self._ask("DELETE", path, part.rows["flowId"].tolist())
        return made


def _is_barred(scope, batch):
    marks = batch.rows["flowMark"] if batch.template.is_flow else np.zeros(len(batch), np.uint32)
    return marks & np.uint32(scope.barred_marks) != 0


def _may_change(scope, batch):
    """In a shared zone, those of the port alone."""
    if not scope.is_shared:
        return np.ones(len(batch), bool)
    return has_end_in(batch, scope.addresses) & ~has_end_in(batch, scope.neighbours)


def _flows(batch):
    """As the appliance calls them: the ends by its words, all else by ours."""
    rows, is_flow = batch.rows, batch.template.is_flow
    return [
        {
            "protocol": _protocol(batch.template),
            **{
                end: [np.asarray(row[f"{side}{family}Address"]).tolist(), is_flow and int(row[f"{side}TransportPort"])]
                for end, side in ENDS.items()
            },
            "seconds": int(row["remainingTimeoutSeconds"]),
            "more": {name: int(row[name]) for name in _more(batch.template)},
        }
        for family in ("IPv6" if batch.template.is_ipv6 else "IPv4",)
        for row in rows
    ]


def _rows(template, role, flows):
    """The other way round, of the flows that are of this template."""
    family = "IPv6" if template.is_ipv6 else "IPv4"
    kind = [
        one
        for one in flows
        if one["protocol"] == _protocol(template) and isinstance(one["from"][0], list) == template.is_ipv6
    ]
    rows = template.empty(len(kind))
    if kind:
        rows["zoneRole"] = role
        rows["flowId"] = [one["id"] for one in kind]
        rows["remainingTimeoutSeconds"] = [one["seconds"] for one in kind]
        for end, side in ENDS.items():
            rows[f"{side}{family}Address"] = [one[end][0] for one in kind]
            if template.is_flow:
                rows["protocolIdentifier"] = _protocol(template)
                rows[f"{side}TransportPort"] = [one[end][1] for one in kind]
        for name in _more(template):
            rows[name] = [one["more"][name] for one in kind]
    return rows


def _protocol(template):
    return template.protocol.number if template.is_flow else "ban"


def _more(template):
    return [field[0] for field in template.state if field[0] not in ("flowId", "remainingTimeoutSeconds")]
