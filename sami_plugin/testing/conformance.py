"""The promises of a firewall driver (`sami_plugin.drivers.base`), each as a test.

Whoever writes a driver subclasses `FlowDriverConformance`, says how to make the driver and the places that it works on,
and runs the class with pytest or, mixed into `unittest.TestCase`, with unittest::

    class TestMyDriver(FlowDriverConformance):
        def make_driver(self):
            return MyDriver()

        def make_scope(self):
            return Scope(port="port", guest="guest", zones={ZoneRole.PORT: 7}, addresses=PORT_ADDRESSES)

A test's name is the promise. Each begins with a new driver and empty scopes. What a driver declares it is held to; what
it does not declare is skipped, and the skip says so. Records of kinds of the driver's own (`model.kinds`) keep the same
promises, as far as they are not of flows alone; `some_flows` says what they look like.
"""

from __future__ import annotations

import dataclasses
import unittest
from collections.abc import Iterable

import netaddr
import numpy as np
import numpy.typing as npt

from sami_plugin.drivers.base import Changes, FlowDriver
from sami_plugin.drivers.loader import load_kinds
from sami_plugin.errors import UndeclaredAbility
from sami_plugin.model.flows import (
    ACCOUNTING,
    BARRED,
    TEMPLATES,
    Addresses,
    Batch,
    FlowStatus,
    Omitted,
    Template,
    ZoneRole,
    helper_octets,
    names,
    turned_round,
)
from sami_plugin.model.keys import KeyIndex
from sami_plugin.model.results import RESULT, Outcome, Reason, Results, lost_fields
from sami_plugin.model.risk import FUNCTION_OF
from sami_plugin.model.scope import Scope

load_kinds()

PORT_ADDRESSES: Addresses = (netaddr.IPAddress("192.0.2.10"), netaddr.IPAddress("2001:db8:1::10"))
"""The guest's own; every flow of `flows` has one of them as its source."""
NEIGHBOUR_ADDRESSES: Addresses = (netaddr.IPAddress("192.0.2.20"), netaddr.IPAddress("2001:db8:1::20"))
"""Of another local port, which shares the zone where a zone is shared."""
OUTSIDE_ADDRESSES: Addresses = (netaddr.IPAddress("198.51.100.1"), netaddr.IPAddress("2001:db8:2::1"))
TRANSLATED_ADDRESSES: Addresses = (netaddr.IPAddress("203.0.113.1"), netaddr.IPAddress("2001:db8:3::1"))

NO_TEMPLATE = Template(
    "udp-of-no-driver",
    TEMPLATES["udp-ipv4"].key,
    (*TEMPLATES["udp-ipv4"].state, ("stateOfNoDriver", "u1")),
)
"""A template that no driver can declare."""

_REPLIED = FlowStatus.SEEN_REPLY | FlowStatus.ASSURED | FlowStatus.CONFIRMED
_TRANSLATED = FlowStatus.SRC_NAT | FlowStatus.SRC_NAT_DONE | FlowStatus.DST_NAT_DONE
TIMEOUT_SECONDS = 600
HELPERS = {"tcp": "ftp", "udp": "tftp"}
"""Those of extended flows, by protocol."""
_BARRING = 0x4
"""Of five flows with the marks 1 to 5, two have it."""


def flows(
    template: Template,
    count: int,
    *,
    source: Addresses = PORT_ADDRESSES,
    destination: Addresses = OUTSIDE_ADDRESSES,
    first: int = 0,
) -> Batch:
    """`count` flows as a guest has them: established, answered, with ten minutes to live, no two with one key.

    The extended ones have labels, counters and a start, and a helper and what else there is for their protocol, but no
    master. The translated ones hide the source behind `TRANSLATED_ADDRESSES`, on the port that they had. `first` sets
    batches apart: those from 0 and those from 1000 share no key as long as neither has more than 1000.
    """
    if not template.is_flow:
        return _records(template, np.arange(first, first + count), source)
    family = "IPv6" if template.is_ipv6 else "IPv4"
    rows = template.empty(count)
    fields = rows.dtype.names or ()
    numbers = np.arange(first, first + count)
    rows["zoneRole"] = ZoneRole.PORT
    protocol = template.protocol
    rows["protocolIdentifier"] = protocol.number
    for field, addresses in ((f"source{family}Address", source), (f"destination{family}Address", destination)):
        rows[field] = _address(addresses, template.is_ipv6)
    identifiers = protocol.identifiers
    if identifiers.swapped is not None:
        here, there = identifiers.swapped
        rows[here], rows[there] = 20000 + numbers, 443
    else:
        rows[identifiers.answered] = protocol.answers[0][0]
        rows["icmpIdentifier"] = 1 + numbers
    rows["flowId"] = 1 + numbers
    rows["conntrackStatus"] = FlowStatus.SEEN_REPLY | FlowStatus.CONFIRMED if "icmp" in template.name else _REPLIED
    rows["remainingTimeoutSeconds"] = TIMEOUT_SECONDS
    rows["flowMark"] = 1 + numbers % 7
    if protocol.states is not None and protocol.state_field in fields:
        rows[protocol.state_field] = protocol.states["ESTABLISHED"]
    if "tcpWindowScale" in fields:
        rows["tcpWindowScale"], rows["reverseTcpWindowScale"] = 7, 8
        rows["tcpTrackingFlags"], rows["reverseTcpTrackingFlags"] = 3, 3
    if "sctpVerificationTag" in fields:
        rows["sctpVerificationTag"], rows["reverseSctpVerificationTag"] = 0x80000001 + numbers, 0x70000001
    if template.is_translated:
        # An IntFlag is an int64 to numpy 2, and that does not fit into a column in place.
        rows["conntrackStatus"] |= np.uint32(_TRANSLATED)
        rows[f"postNATSource{family}Address"] = _address(TRANSLATED_ADDRESSES, template.is_ipv6)
        rows[f"postNATDestination{family}Address"] = rows[f"destination{family}Address"]
        for name, behind in identifiers.behind.items():
            rows[behind] = rows[name]
    if template.is_expectation:
        rows["conntrackStatus"], rows["flowMark"] = 0, 0
        rows["conntrackHelper"], rows["masterProtocolIdentifier"] = helper_octets("ftp"), 6
        rows[f"masterSource{family}Address"] = rows[f"source{family}Address"]
        rows[f"masterDestination{family}Address"] = rows[f"destination{family}Address"]
        rows["masterSourceTransportPort"], rows["masterDestinationTransportPort"] = 20000, 21
    if template.is_extended:
        rows["conntrackLabels"] = [(1 + number, 1 << 63) for number in numbers]
        if template.protocol.name in HELPERS:
            rows["conntrackHelper"] = helper_octets(HELPERS[template.protocol.name])
            rows["conntrackStatus"] |= np.uint32(FlowStatus.HELPER)
        for position, (name, *_) in enumerate(protocol.extension, 1):
            rows[name] = (position << 24) + numbers
            rows["conntrackStatus"] |= np.uint32(FlowStatus.SEQ_ADJUST)
        for position, name in enumerate(ACCOUNTING, 1):
            rows[name] = (position << 40) + numbers
    return Batch(template, rows)


def _records(template: Template, numbers: npt.NDArray[np.int_], source: Addresses) -> Batch:
    """Records of a kind that is none of flows: the last field of the key that is no end tells them apart."""
    rows = template.empty(len(numbers))
    rows["zoneRole"], rows["remainingTimeoutSeconds"] = ZoneRole.PORT, TIMEOUT_SECONDS
    rows[template.ends[0]] = _address(source, template.is_ipv6)
    other = [field[0] for field in template.key[1:] if field[0] not in template.ends][-1:]
    for name in other:
        column = rows[name] if rows[name].ndim == 1 else rows[name][:, -1]
        column[:] = 1 + numbers % min(np.iinfo(column.dtype).max, 1 << 31)
    return Batch(template, rows)


def _has_two_sides(template: Template) -> bool:
    """Whether either end may have begun such a flow; a translated one seen from its other end is another one."""
    return template.is_flow and template.protocol.identifiers.swapped is not None and not template.is_translated


def _address(addresses: Addresses, is_ipv6: bool) -> int | tuple[int, int]:
    address = next(address for address in addresses if (address.version == 6) == is_ipv6)
    return divmod(int(address), 1 << 64) if is_ipv6 else int(address)


class FlowDriverConformance:
    """The suite. Override the first methods; every `test_` method is one promise."""

    count = 5
    """Flows of one batch."""

    # What a driver's author says.

    def make_driver(self) -> FlowDriver:
        """A driver whose device is in order and has room for some dozens of flows."""
        raise NotImplementedError

    def make_scope(self) -> Scope:
        """A port with a zone of its own for `ZoneRole.PORT`, without any flow, and `PORT_ADDRESSES`."""
        raise NotImplementedError

    def make_other_scope(self) -> Scope:
        """Another port of the same device with another zone of its own; its addresses may be the same."""
        raise NotImplementedError

    def make_shared_scope(self) -> Scope | None:
        """A port with `PORT_ADDRESSES` in a zone shared with `NEIGHBOUR_ADDRESSES`; None if zones are never shared."""
        raise NotImplementedError

    def some_flows(self, template: Template, count: int, first: int = 0) -> Batch:
        """Flows that the device can take, with keys that `first` sets apart; see `flows`."""
        return flows(template, count, first=first)

    def lost_by_nature(self, template: Template) -> frozenset[str]:
        """State fields that this device cannot keep, beside those of functions that the driver does not declare."""
        return frozenset()

    def has_fixed_timeouts(self, template: Template) -> bool:
        """Whether this device cannot give such flows another timeout than the one that they were inserted with."""
        return False

    # Inserting, reading back, exporting.

    def test_capabilities_name_known_templates_and_a_device(self) -> None:
        able = self.make_driver().capabilities(self.make_scope())
        _promise(able.templates <= set(TEMPLATES), f"it declares unknown templates: {able.templates - set(TEMPLATES)}")
        _promise(bool(able.templates), "it declares no template at all")
        _promise(bool(able.device), "the device has no identity")
        _promise(able.in_use >= 0, f"{able.in_use} flows are in use")

    def test_driver_is_true_and_has_no_length(self) -> None:
        driver = self.make_driver()
        _promise(not hasattr(type(driver), "__len__"), "stevedore mistakes a driver with a length for a missing one")
        _promise("__bool__" not in dir(type(driver)), "stevedore mistakes a false driver for a missing one")

    def test_empty_scope_exports_nothing(self) -> None:
        driver, scope = self.make_driver(), self.make_scope()
        _promise(not _exported(driver, scope), "an empty zone has flows")

    def test_inserted_flows_are_read_back_as_they_were_sent(self) -> None:
        for template, driver, scope in self._each_template():
            sent = self.some_flows(template, self.count)
            _all(driver.insert(scope, sent), Outcome.IMPORTED, f"inserting {template.name}")
            kept, found = driver.read_back(scope, sent)
            _promise(bool(found.all()), f"{template.name}: {_said(sent, ~found)} not there after the insert")
            self._same(driver, scope, sent, kept)
            self._clear(driver, scope)

    def test_inserted_flows_are_exported_as_they_were_sent(self) -> None:
        for template, driver, scope in self._each_template():
            sent = self.some_flows(template, self.count)
            driver.insert(scope, sent)
            exported = _exported(driver, scope)
            _promise(
                set(exported) == {template.name},
                f"{template.name} was inserted and {', '.join(exported) or 'nothing'} exported",
            )
            told = exported[template.name]
            at = KeyIndex(told).find(sent)
            _promise(bool((at >= 0).all()), f"{_said(sent, at < 0)} not exported")
            _promise(len(told) == len(sent), f"{len(sent)} flows were inserted and {len(told)} exported")
            self._same(driver, scope, sent, told.take(at))
            self._clear(driver, scope)

    def test_exported_flows_have_ids_of_their_own(self) -> None:
        for template, driver, scope in self._each_template():
            driver.insert(scope, self.some_flows(template, self.count))
            ids = _exported(driver, scope)[template.name].rows["flowId"]
            if template.is_flow or ids.any():
                _promise(bool((ids != 0).all()), "an exported flow has no id")
                _promise(len(np.unique(ids)) == len(ids), "two exported flows have one id")
            self._clear(driver, scope)

    def test_export_of_one_device_goes_into_it_again(self) -> None:
        for template, driver, scope in self._each_template():
            sent = self.some_flows(template, self.count)
            driver.insert(scope, sent)
            told = _exported(driver, scope)[template.name]
            self._clear(driver, scope)
            _all(driver.insert(scope, told), Outcome.IMPORTED, f"inserting exported {template.name}")
            again = _exported(driver, scope)[template.name]
            self._same(driver, scope, told, again.take(KeyIndex(again).find(told)))
            self._clear(driver, scope)

    def test_timeout_is_set_and_only_runs_down(self) -> None:
        for template, driver, scope in self._each_template():
            sent = self.some_flows(template, self.count)
            driver.insert(scope, sent)
            left = driver.read_back(scope, sent)[0].rows["remainingTimeoutSeconds"]
            asked = int(sent.rows["remainingTimeoutSeconds"][0])
            _promise(
                bool(((left <= asked) & (left > asked // 2)).all()),
                f"{template.name}: {asked} s were asked for and {left.tolist()} s are left",
            )
            self._clear(driver, scope)

    def test_repeated_insert_replaces_and_leaves_one_entry_each(self) -> None:
        for template, driver, scope in self._each_template():
            sent = self.some_flows(template, self.count)
            driver.insert(scope, sent)
            if "flowMark" in (sent.rows.dtype.names or ()):
                sent.rows["flowMark"] += 40
            _all(driver.insert(scope, sent), Outcome.IMPORTED, f"repeating the insert of {template.name}")
            told = _exported(driver, scope)[template.name]
            _promise(len(told) == self.count, f"{self.count} flows inserted twice are {len(told)}")
            self._same(driver, scope, sent, driver.read_back(scope, sent)[0])
            self._clear(driver, scope)

    def test_insert_replaces_the_same_tuple_turned_round(self) -> None:
        for template, driver, scope in self._each_template():
            if not _has_two_sides(template):
                continue
            sent = self.some_flows(template, self.count)
            driver.insert(scope, turned_round(sent))
            _all(driver.insert(scope, sent), Outcome.IMPORTED, f"inserting {template.name} over its reverse")
            told = _exported(driver, scope)[template.name]
            _promise(
                len(told) == self.count and bool((KeyIndex(told).find(sent) >= 0).all()),
                f"{template.name}: entries of the reversed tuple are there beside the new ones",
            )
            self._clear(driver, scope)

    def test_place_of_another_guest_s_nat_is_taken_from_nobody(self) -> None:
        for template, driver, scope in self._each_template():
            if not template.is_translated:
                continue
            others = dataclasses.replace(scope, port="other", guest="other", addresses=NEIGHBOUR_ADDRESSES)
            theirs, mine = flows(template, 2, source=NEIGHBOUR_ADDRESSES), flows(template, 2)
            driver.insert(others, theirs)
            before = driver.read_back(others, theirs)[0].rows["flowId"]
            made = driver.insert(scope, mine)
            _all(made, Outcome.REFUSED, f"inserting {template.name} where another guest's answers come to")
            _promise(bool((made["reason"] == Reason.TRANSLATION_TAKEN).all()), "the reason is not TRANSLATION_TAKEN")
            self._there(driver, others, theirs, "what another guest's NAT had was taken away:")
            after = driver.read_back(others, theirs)[0].rows["flowId"]
            _promise(bool((before == after).all()), "what another guest's NAT had was replaced")
            driver.remove(others, _named(theirs))

    def test_results_are_one_per_record_in_order(self) -> None:
        driver, scope = self.make_driver(), self.make_scope()
        template = self._declared(driver, scope)[0]
        there, not_there = self.some_flows(template, 2), self.some_flows(template, 2, first=1000)
        driver.insert(scope, there)
        mixed = Batch.joined(template, [not_there.rows[:1], there.rows, not_there.rows[1:]])
        expected = [Outcome.ABSENT, Outcome.REMOVED, Outcome.REMOVED, Outcome.ABSENT]
        kept, found = driver.read_back(scope, mixed)
        _promise(found.tolist() == [False, True, True, False], f"read_back found {found.tolist()}")
        _promise(kept.rows.dtype == template.dtype and len(kept) == 4, "read_back has rows of another kind or count")
        _promise(not any(kept.rows[~found].tobytes()), "read_back invents rows of flows that are not there")
        made = driver.remove(scope, _named(mixed))
        _promise(made.dtype == RESULT, "results have another dtype than model.results.RESULT")
        _promise(made["outcome"].tolist() == expected, f"outcomes are {made['outcome'].tolist()}, not {expected}")

    def test_empty_batches_are_taken_and_do_nothing(self) -> None:
        for template, driver, scope in self._each_template():
            sent = self.some_flows(template, self.count)
            driver.insert(scope, sent)
            nothing = Batch(template, template.empty())
            for did in (driver.insert(scope, nothing), driver.renew(scope, nothing)):
                _promise(len(did) == 0, "an empty batch has results")
            _promise(len(driver.read_back(scope, nothing)[0]) == 0, "an empty batch reads something back")
            _promise(len(driver.remove(scope, nothing.identities)) == 0, "an empty removal has results")
            self._there(driver, scope, sent, "an empty batch removed")
            self._clear(driver, scope)

    def test_what_is_given_is_not_changed(self) -> None:
        for template, driver, scope in self._each_template():
            sent = self.some_flows(template, self.count)
            before = sent.rows.tobytes()
            driver.insert(scope, sent)
            driver.renew(scope, sent)
            driver.read_back(scope, sent)
            driver.remove(scope, sent.identities)
            _promise(sent.rows.tobytes() == before, f"the driver wrote into a batch of {template.name}")

    def test_arrival_leaves_what_is_there_and_makes_nothing(self) -> None:
        for template, driver, scope in self._each_template():
            rows = self.some_flows(template, 2 * self.count).rows
            sent, absent = Batch(template, rows[: self.count]), Batch(template, rows[self.count :])
            driver.insert(scope, sent)
            before = sent.rows.tobytes()
            for batch in (sent, absent, Batch(template, template.empty())):
                driver.arrived(scope, batch)
            _promise(sent.rows.tobytes() == before, f"the driver wrote into a batch of {template.name}")
            self._there(driver, scope, sent, "an arrival removed")
            _promise(not driver.read_back(scope, absent)[1].any(), f"an arrival makes {template.name}")
            self._clear(driver, scope)

    def test_read_only_rows_are_taken(self) -> None:
        for template, driver, scope in self._each_template():
            sent = self.some_flows(template, self.count)
            sent.rows.flags.writeable = False
            _all(driver.insert(scope, sent), Outcome.IMPORTED, "inserting read-only rows")
            self._clear(driver, scope)

    def test_undeclared_template_is_refused_by_record(self) -> None:
        driver, scope = self.make_driver(), self.make_scope()
        undeclared = [each for name, each in TEMPLATES.items() if name not in driver.capabilities(scope).templates]
        for batch in (*(self.some_flows(each, 2) for each in undeclared), flows(NO_TEMPLATE, 2)):
            made = driver.insert(scope, batch)
            _all(made, Outcome.REFUSED, f"inserting undeclared {batch.template.name}")
            _promise(
                bool((made["reason"] == Reason.NOT_DECLARED).all()),
                f"{batch.template.name} is refused for {made['reason'].tolist()}, not as NOT_DECLARED",
            )
        _promise(not _exported(driver, scope), "refused flows are in the device")

    def test_kind_of_another_driver_is_not_there_and_does_no_harm(self) -> None:
        driver, scope = self.make_driver(), self.make_scope()
        declared = driver.capabilities(scope).templates
        for template in (one for name, one in TEMPLATES.items() if not one.is_flow and name not in declared):
            for batch in (_records(template, np.arange(2), PORT_ADDRESSES), Batch(template, template.empty())):
                _promise(not driver.read_back(scope, batch)[1].any(), f"{template.name} is read back, and undeclared")
                made = driver.renew(scope, batch)
                _promise(not (made["outcome"] == Outcome.IMPORTED).any(), f"{template.name} is renewed, and undeclared")
                _all(driver.remove(scope, batch.identities), Outcome.ABSENT, f"removing undeclared {template.name}")

    # Removing.

    def test_remove_takes_its_victims_and_no_other(self) -> None:
        for template, driver, scope in self._each_template():
            victims, others = self.some_flows(template, 2), self.some_flows(template, 3, first=1000)
            driver.insert(scope, victims)
            driver.insert(scope, others)
            _all(driver.remove(scope, _named(victims)), Outcome.REMOVED, f"removing {template.name}")
            _promise(not driver.read_back(scope, victims)[1].any(), "removed flows are still there")
            self._there(driver, scope, others, "beside its victims a removal took")
            self._clear(driver, scope)

    def test_repeated_removal_finds_nothing_and_says_so(self) -> None:
        for template, driver, scope in self._each_template():
            sent = self.some_flows(template, self.count)
            driver.insert(scope, sent)
            driver.remove(scope, _named(sent))
            _all(driver.remove(scope, _named(sent)), Outcome.ABSENT, f"removing {template.name} again")

    def test_removal_with_the_right_id_removes(self) -> None:
        for template, driver, scope in self._each_template():
            driver.insert(scope, self.some_flows(template, self.count))
            told = _exported(driver, scope)[template.name]
            _all(driver.remove(scope, told.identities), Outcome.REMOVED, f"removing {template.name} by key and id")

    def test_removal_with_another_id_leaves_the_flow(self) -> None:
        for template, driver, scope in self._each_template():
            sent = self.some_flows(template, self.count)
            driver.insert(scope, sent)
            wrong = driver.read_back(scope, sent)[0].identities
            if not template.is_flow and not wrong.rows["flowId"].any():
                self._clear(driver, scope)
                continue
            wrong.rows["flowId"] ^= 0x5A5A5A5A
            _all(driver.remove(scope, wrong), Outcome.ABSENT, f"removing {template.name} by another id")
            self._there(driver, scope, sent, "a removal with another id took")
            self._clear(driver, scope)

    def test_removal_of_the_tuple_turned_round_leaves_the_flow(self) -> None:
        for template, driver, scope in self._each_template():
            if not _has_two_sides(template):
                continue
            sent = self.some_flows(template, self.count)
            driver.insert(scope, sent)
            _all(driver.remove(scope, _named(turned_round(sent))), Outcome.ABSENT, "removing the reversed key")
            self._there(driver, scope, sent, "the name of the reversed flow removed")
            self._clear(driver, scope)

    def test_flow_that_is_made_again_has_another_id(self) -> None:
        for template, driver, scope in self._each_template():
            sent = self.some_flows(template, 1)
            driver.insert(scope, sent)
            first = int(driver.read_back(scope, sent)[0].rows["flowId"][0])
            driver.remove(scope, _named(sent))
            driver.insert(scope, sent)
            second = int(driver.read_back(scope, sent)[0].rows["flowId"][0])
            has_ids = template.is_flow or first or second
            _promise(
                not has_ids or first != second,
                f"{template.name} has the id {first} again after it was removed and made anew",
            )
            self._clear(driver, scope)

    # Renewing.

    def test_renew_sets_the_timeout_of_what_is_there(self) -> None:
        for template, driver, scope in self._each_template():
            sent = self.some_flows(template, self.count)
            driver.insert(scope, sent)
            before = driver.read_back(scope, sent)[0]
            sent.rows["remainingTimeoutSeconds"] = 6 * TIMEOUT_SECONDS
            is_fixed = self.has_fixed_timeouts(template)
            wanted = Outcome.PRESENT if is_fixed else Outcome.IMPORTED
            _all(driver.renew(scope, sent), wanted, f"renewing {template.name}")
            after = driver.read_back(scope, sent)[0]
            left = after.rows["remainingTimeoutSeconds"]
            _promise(
                is_fixed or bool(((left > 3 * TIMEOUT_SECONDS) & (left <= 6 * TIMEOUT_SECONDS)).all()),
                f"{template.name}: {left.tolist()} s are left after a renewal to {6 * TIMEOUT_SECONDS} s",
            )
            _promise(bool((after.rows["flowId"] == before.rows["flowId"]).all()), "a renewal makes the flow anew")
            self._same(driver, scope, before, after)
            self._clear(driver, scope)

    def test_renew_never_creates(self) -> None:
        for template, driver, scope in self._each_template():
            _all(driver.renew(scope, self.some_flows(template, 2)), Outcome.ABSENT, f"renewing absent {template.name}")
            _promise(not _exported(driver, scope), "a renewal made a flow")

    # Scopes.

    def test_other_zones_are_not_touched(self) -> None:
        driver, scope, other = self.make_driver(), self.make_scope(), self.make_other_scope()
        template = self._declared(driver, scope)[0]
        sent = self.some_flows(template, self.count)
        driver.insert(other, sent)
        _promise(not _exported(driver, scope), "flows of another zone are exported")
        _promise(not driver.read_back(scope, sent)[1].any(), "flows of another zone are read back")
        _all(driver.renew(scope, sent), Outcome.ABSENT, "renewing flows of another zone")
        _all(driver.remove(scope, _named(sent)), Outcome.ABSENT, "removing flows of another zone")
        driver.insert(scope, sent)
        _all(driver.remove(scope, _named(sent)), Outcome.REMOVED, "removing what is in both zones")
        self._there(driver, other, sent, "a removal in one zone took from another")

    def test_role_that_the_scope_has_not_is_refused(self) -> None:
        driver, scope = self.make_driver(), self.make_scope()
        missing = [role for role in ZoneRole if role not in scope.zones]
        if not missing:
            raise unittest.SkipTest("the scope has a zone for every role")
        sent = self.some_flows(self._declared(driver, scope)[0], 2)
        sent.rows["zoneRole"] = missing[0]
        _all(driver.insert(scope, sent), Outcome.REFUSED, f"inserting for the role {missing[0].name}")
        _promise(not _exported(driver, scope), "a flow of a role without a zone went into some zone")

    def test_scope_without_zones_holds_nothing_and_takes_nothing(self) -> None:
        driver, scope = self.make_driver(), self.make_scope()
        sent = self.some_flows(self._declared(driver, scope)[0], 2)
        driver.insert(scope, sent)
        nowhere = dataclasses.replace(scope, zones={})
        _promise(not _exported(driver, nowhere), "a scope without zones exports flows")
        _promise(not driver.read_back(nowhere, sent)[1].any(), "a scope without zones reads flows back")
        _all(driver.remove(nowhere, _named(sent)), Outcome.ABSENT, "removing in a scope without zones")
        self._there(driver, scope, sent, "a removal in a scope without zones took")

    def test_shared_zone_shows_the_flows_of_the_port_alone(self) -> None:
        driver, mine, theirs = self._shared()
        for template in self._declared(driver, mine):
            own = self.some_flows(template, 2)
            driver.insert(mine, own)
            neighbours = self._of_neighbour(template, first=1000)
            driver.insert(theirs, neighbours)
            told = _exported(driver, mine).get(template.name)
            _promise(told is not None and len(told) == 2, "not the flows of the port, or not they alone, are exported")
            self._there(driver, theirs, neighbours, "the insert of another port's flows lost")
            self._clear(driver, mine)
            self._clear(driver, theirs)

    def test_neighbours_flows_are_never_touched(self) -> None:
        driver, mine, theirs = self._shared()
        for template in self._declared(driver, mine):
            neighbours = self._of_neighbour(template)
            driver.insert(theirs, neighbours)
            before = driver.read_back(theirs, neighbours)[0]
            made = driver.remove(mine, _named(neighbours))
            _promise(not (made["outcome"] == Outcome.REMOVED).any(), "a neighbour's flow is said to be removed")
            longer = neighbours.copy()
            longer.rows["remainingTimeoutSeconds"] = 6 * TIMEOUT_SECONDS
            driver.renew(mine, longer)
            made = driver.insert(mine, neighbours)
            _promise(not (made["outcome"] == Outcome.IMPORTED).any(), "a neighbour's own flow is said to be imported")
            after, found = driver.read_back(theirs, neighbours)
            _promise(bool(found.all()), "a neighbour's flow is gone")
            is_same = after.rows["flowId"] == before.rows["flowId"]
            _promise(bool(is_same.all()), "a neighbour's flow was replaced")
            _promise(
                bool((after.rows["remainingTimeoutSeconds"] <= TIMEOUT_SECONDS).all()), "a neighbour's flow was renewed"
            )
            self._clear(driver, theirs)

    def test_flow_with_a_neighbour_is_the_neighbours(self) -> None:
        driver, mine, theirs = self._shared()
        for template in self._declared(driver, mine):
            if template.is_translated or not template.is_flow:
                continue
            between = flows(template, 2, destination=NEIGHBOUR_ADDRESSES)
            made = driver.insert(mine, between)
            _all(made, Outcome.REFUSED, "inserting a flow between two local ports, of which the neighbour has none")
            _promise(bool((made["reason"] == Reason.LOCAL_PORTS_OWN).all()), "the reason is not LOCAL_PORTS_OWN")
            alone = dataclasses.replace(theirs, neighbours=())
            _all(driver.insert(alone, between), Outcome.IMPORTED, "inserting where no neighbour is known")
            before = driver.read_back(theirs, between)[0].rows["flowId"]
            _all(driver.insert(mine, between), Outcome.PRESENT, "inserting a flow that a neighbour has")
            made = driver.remove(mine, _named(between))
            _promise(not (made["outcome"] == Outcome.REMOVED).any(), "a flow that a neighbour shares was removed")
            kept, found = driver.read_back(theirs, between)
            _promise(bool(found.all()), "a flow that a neighbour shares is gone")
            _promise(bool((kept.rows["flowId"] == before).all()), "a flow that a neighbour shares was replaced")
            driver.remove(alone, _named(between))

    # Flows that the firewall drops although their entries are there.

    def test_barred_flows_are_omitted_and_named_and_the_others_told(self) -> None:
        for template, driver, scope in self._each_marked():
            barring = dataclasses.replace(scope, barred_marks=_BARRING)
            sent = self.some_flows(template, self.count)
            driver.insert(scope, sent)
            told = list(driver.export(barring))
            batches = [part for part in told if not isinstance(part, Omitted)]
            is_barred = sent.rows["flowMark"] & _BARRING != 0
            found = KeyIndex(_merged(batches, template)).find(sent) >= 0
            _promise(not found[is_barred].any(), f"{_said(sent, found & is_barred)} exported, which the firewall drops")
            _promise(bool(found[~is_barred].all()), f"{_said(sent, ~found & ~is_barred)} not exported")
            counts = [part.count for part in told if isinstance(part, Omitted) and part.reason == BARRED]
            _promise(sum(counts) == is_barred.sum(), f"{is_barred.sum()} flows are barred and {sum(counts)} named so")
            self._clear(driver, scope)

    def test_barred_flows_are_refused_and_the_others_put_in(self) -> None:
        for template, driver, scope in self._each_marked():
            barring = dataclasses.replace(scope, barred_marks=_BARRING)
            sent = self.some_flows(template, self.count)
            made = driver.insert(barring, sent)
            is_barred = sent.rows["flowMark"] & _BARRING != 0
            _all(made[is_barred], Outcome.REFUSED, "inserting flows that the firewall drops")
            _promise(bool((made["reason"][is_barred] == Reason.BARRED).all()), "the reason is not BARRED")
            _all(made[~is_barred], Outcome.IMPORTED, "inserting the others")
            found = driver.read_back(scope, sent)[1]
            _promise(not found[is_barred].any(), f"{_said(sent, found & is_barred)} there although refused")
            self._clear(driver, scope)

    def test_watch_tells_a_flow_that_became_barred_as_removed(self) -> None:
        for template, driver, scope in self._each_marked():
            self._watches(driver, scope)
            barring = dataclasses.replace(scope, barred_marks=_BARRING)
            before = self.some_flows(template, 1)
            before.rows["flowMark"] = 0
            driver.insert(scope, before)
            known = _Known(template)
            with driver.watch(barring) as watch:
                known.export(driver, barring)
                _promise(len(known.ids) == 1, "a flow without a mark is not exported")
                marked = before.copy()
                marked.rows["flowMark"] = _BARRING
                driver.insert(scope, marked)
                known.apply(self._complete(watch.collect()))
            _promise(not known.ids, "a flow that the firewall drops now is not told as removed, or told as there")
            self._clear(driver, scope)

    # Watching.

    def test_watch_that_is_not_declared_raises(self) -> None:
        driver, scope = self.make_driver(), self.make_scope()
        if driver.capabilities(scope).can_watch:
            raise unittest.SkipTest("the driver can watch")
        try:
            driver.watch(scope)
        except UndeclaredAbility:
            return
        _promise(False, "watch is not declared, and does not raise UndeclaredAbility")

    def test_watch_tells_what_was_made_and_what_went(self) -> None:
        for template, driver, scope in self._each_watched():
            sent = self.some_flows(template, self.count)
            with driver.watch(scope) as watch:
                _promise(not _count(watch.collect()), "a watch tells changes before there are any")
                driver.insert(scope, sent)
                told = self._complete(watch.collect())
                _promise(not told.removals, "a flow that was made is told as removed")
                upserts = _merged(told.upserts, template)
                _promise(len(upserts) == len(sent), f"{len(sent)} flows were made and {len(upserts)} told")
                self._same(driver, scope, sent, upserts.take(KeyIndex(upserts).find(sent)))
                driver.remove(scope, _named(sent))
                told = self._complete(watch.collect())
                gone = _merged(told.removals, template.identity)
                _promise(not told.upserts, "a flow that is gone is told as there")
                _promise(
                    len(gone) == len(sent) and bool((KeyIndex(gone).find(sent) >= 0).all()),
                    f"{len(sent)} flows went and {len(gone)} removals were told",
                )
                ids = upserts.rows["flowId"][KeyIndex(upserts).find(gone)]
                _promise(bool((ids == gone.rows["flowId"]).all()), "a removal has another id than the flow had")
                _promise(not _count(watch.collect()), "changes are told twice")

    def test_watch_before_export_leaves_no_gap(self) -> None:
        for template, driver, scope in self._each_watched():
            before, between = self.some_flows(template, 3), self.some_flows(template, 3, first=1000)
            late = self.some_flows(template, 3, first=2000)
            driver.insert(scope, before)
            with driver.watch(scope) as watch:
                driver.insert(scope, between)
                known = _Known(template)
                known.export(driver, scope)
                driver.insert(scope, late)
                driver.remove(scope, _named(before.take(np.array([0]))))
                driver.remove(scope, _named(between.take(np.array([1]))))
                known.apply(self._complete(watch.collect()))
            self._knows(known, driver, scope)
            self._clear(driver, scope)

    def test_changes_are_merged_to_what_is_now(self) -> None:
        for template, driver, scope in self._each_watched():
            sent = self.some_flows(template, 2)
            passing = self.some_flows(template, 1, first=1000)
            driver.insert(scope, sent)
            known = _Known(template)
            with driver.watch(scope) as watch:
                known.export(driver, scope)
                for _ in range(3):
                    driver.remove(scope, _named(sent))
                    driver.insert(scope, sent)
                driver.insert(scope, passing)
                driver.remove(scope, _named(passing))
                told = self._complete(watch.collect())
            upserts, removals = _merged(told.upserts, template), _merged(told.removals, template.identity)
            keys = np.unique(KeyIndex(upserts).find(upserts))
            _promise(len(keys) == len(upserts), "one flow is told as there several times")
            _promise(not (KeyIndex(upserts).find(passing) >= 0).any(), "a flow that came and went is told as there")
            at = KeyIndex(upserts).find(removals)
            same = (at >= 0) & (upserts.rows["flowId"][at] == removals.rows["flowId"]) if len(upserts) else at >= 0
            _promise(not same.any(), "a flow that is there is told as removed, by its key and id")
            known.apply(told)
            self._knows(known, driver, scope)
            self._clear(driver, scope)

    def test_watch_tells_its_own_scope_alone(self) -> None:
        driver, scope, other = self.make_driver(), self.make_scope(), self.make_other_scope()
        self._watches(driver, scope)
        sent = self.some_flows(self._declared(driver, scope)[0], self.count)
        with driver.watch(scope) as watch:
            driver.insert(other, sent)
            driver.remove(other, _named(sent))
            _promise(not _count(watch.collect()), "a watch tells changes of another zone")

    def test_watches_do_not_take_from_each_other(self) -> None:
        driver, scope = self.make_driver(), self.make_scope()
        self._watches(driver, scope)
        sent = self.some_flows(self._declared(driver, scope)[0], self.count)
        with driver.watch(scope) as first, driver.watch(scope) as second:
            driver.insert(scope, sent)
            for watch in (first, second):
                _promise(_count(watch.collect()) == self.count, "one of two watches misses changes")

    def test_watch_closes_more_than_once(self) -> None:
        driver, scope = self.make_driver(), self.make_scope()
        self._watches(driver, scope)
        watch = driver.watch(scope)
        watch.close()
        watch.close()
        driver.insert(scope, self.some_flows(self._declared(driver, scope)[0], 1))

    # What the tests are made of.

    def _declared(self, driver: FlowDriver, scope: Scope) -> list[Template]:
        """All but what is expected, which takes a master, and a helper of the device's own."""
        declared = [TEMPLATES[name] for name in sorted(driver.capabilities(scope).templates)]
        return [template for template in declared if not template.is_expectation]

    def _of_neighbour(self, template: Template, first: int = 0) -> Batch:
        if template.is_flow:
            return flows(template, 2, source=NEIGHBOUR_ADDRESSES, first=first)
        made = self.some_flows(template, 2, first)
        own = made.rows[template.ends[0]].copy()
        for name in template.address_fields:
            if np.array_equal(made.rows[name], own):  # wherever the port's own address stands
                made.rows[name] = _address(NEIGHBOUR_ADDRESSES, template.is_ipv6)
        return made

    def _each_template(self) -> Iterable[tuple[Template, FlowDriver, Scope]]:
        driver, scope = self.make_driver(), self.make_scope()
        for template in self._declared(driver, scope):
            yield template, driver, scope

    def _each_watched(self) -> Iterable[tuple[Template, FlowDriver, Scope]]:
        driver, scope = self.make_driver(), self.make_scope()
        self._watches(driver, scope)
        for template in self._declared(driver, scope):
            yield template, driver, scope

    def _each_marked(self) -> Iterable[tuple[Template, FlowDriver, Scope]]:
        driver, scope = self.make_driver(), self.make_scope()
        kinds = (one for one in self._declared(driver, scope) if "flowMark" in (one.dtype.names or ()))
        marked = [one for one in kinds if "flowMark" not in self._not_kept(driver, scope, one)]
        if not marked:
            raise unittest.SkipTest("the device keeps no marks")
        for template in marked:
            yield template, driver, scope

    def _watches(self, driver: FlowDriver, scope: Scope) -> None:
        if not driver.capabilities(scope).can_watch:
            raise unittest.SkipTest("the driver does not declare that it can watch")

    def _shared(self) -> tuple[FlowDriver, Scope, Scope]:
        """A driver, the port's shared scope, and the same zone as the neighbour sees it."""
        mine = self.make_shared_scope()
        if mine is None:
            raise unittest.SkipTest("the driver's zones are never shared")
        theirs = dataclasses.replace(
            mine,
            port="neighbour",
            guest="neighbour",
            addresses=NEIGHBOUR_ADDRESSES,
            neighbours=PORT_ADDRESSES,
        )
        return self.make_driver(), mine, theirs

    def _not_kept(self, driver: FlowDriver, scope: Scope, template: Template) -> set[str]:
        """Fields that no promise is made of: the driver says so by its functions, or its author here."""
        functions = driver.capabilities(scope).functions
        undeclared = {name for name, function in FUNCTION_OF.items() if function not in functions}
        return undeclared | self.lost_by_nature(template)

    def _same(self, driver: FlowDriver, scope: Scope, sent: Batch, kept: Batch) -> None:
        lost = int(np.bitwise_or.reduce(lost_fields(sent, kept.rows))) if len(sent) else 0
        fields = {field[0] for position, field in enumerate(sent.template.state) if lost >> position & 1}
        fields -= self._not_kept(driver, scope, sent.template)
        _promise(not fields, f"{sent.template.name}: {', '.join(sorted(fields))} not as they were")

    def _there(self, driver: FlowDriver, scope: Scope, batch: Batch, what: str) -> None:
        found = driver.read_back(scope, batch)[1]
        _promise(bool(found.all()), f"{what} {_said(batch, ~found)}")

    def _clear(self, driver: FlowDriver, scope: Scope) -> None:
        for batch in _exported(driver, scope).values():
            driver.remove(scope, _named(batch))
        _promise(not _exported(driver, scope), "flows are left after all that were exported were removed by name")

    def _complete(self, changes: Changes) -> Changes:
        _promise(changes.is_complete, "the device says that it lost events of a handful of changes")
        return changes

    def _knows(self, known: _Known, driver: FlowDriver, scope: Scope) -> None:
        now = _exported(driver, scope).get(known.template.name, Batch(known.template, known.template.empty()))
        truth = {row.tobytes()[: known.template.key_octets]: int(row["flowId"]) for row in now.rows}
        _promise(
            known.ids == truth,
            f"{known.template.name}: export and changes tell {len(known.ids)} flows, {len(truth)} are there, "
            f"{len(known.ids.items() ^ truth.items())} differ by key or id",
        )


class _Known:
    """What somebody knows who has seen an export and then changes: ids by key."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.ids: dict[bytes, int] = {}

    def export(self, driver: FlowDriver, scope: Scope) -> None:
        for batch in _exported(driver, scope).values():
            self._put(batch)

    def apply(self, changes: Changes) -> None:
        for batch in changes.removals:
            for row in batch.rows:
                key = row.tobytes()[: self.template.key_octets]
                if self.ids.get(key) == int(row["flowId"]):
                    del self.ids[key]
        for batch in changes.upserts:
            self._put(batch)

    def _put(self, batch: Batch) -> None:
        for row in batch.rows:
            self.ids[row.tobytes()[: self.template.key_octets]] = int(row["flowId"])


def _promise(is_kept: bool, otherwise: str) -> None:
    # An assert would say nothing here: pytest rewrites those of test modules only, and -O drops them.
    if not is_kept:
        raise AssertionError(otherwise)


def _all(made: Results, outcome: Outcome, what: str) -> None:
    others = made[made["outcome"] != outcome]
    told = sorted({f"{Outcome(int(each['outcome'])).name}/{Reason(int(each['reason'])).name}" for each in others})
    _promise(not told, f"{what}: {len(others)} of {len(made)} are {', '.join(told)}, not {outcome.name}")


def _said(batch: Batch, which: npt.NDArray[np.bool_]) -> str:
    return ", ".join(names(batch.take(which), 3))


def _named(batch: Batch) -> Batch:
    """Names without ids, as of somebody who does not know this device's."""
    identities = batch.identities
    identities.rows["flowId"] = 0
    return identities


def _exported(driver: FlowDriver, scope: Scope) -> dict[str, Batch]:
    """The flows of an export by template; each once, though an export may tell one several times."""
    parts: dict[str, list[Batch]] = {}
    for told in driver.export(scope):
        if isinstance(told, Omitted):
            raise AssertionError(f"the driver omits {told.count} flows that it declares: {told.reason}")
        if len(told):
            _promise(told.rows.dtype == told.template.dtype, f"exported rows are not of {told.template.name}")
            parts.setdefault(told.template.name, []).append(told)
    whole = {name: _merged(batches, batches[0].template) for name, batches in parts.items()}
    return {name: batch.take(np.unique(KeyIndex(batch).find(batch))) for name, batch in whole.items()}


def _merged(batches: Iterable[Batch], template: Template) -> Batch:
    rows = [batch.rows for batch in batches if batch.rows.dtype == template.dtype]
    return Batch.joined(template, rows)


def _count(changes: Changes) -> int:
    return sum(map(len, (*changes.removals, *changes.upserts)))
