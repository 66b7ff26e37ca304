"""What a host promises of its firewall, and to how many."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sami_plugin.drivers.base import Capabilities
from sami_plugin.migration.negotiation import Demand
from sami_plugin.model.scope import Scope
from sami_plugin.model.settings import Settings
from sami_plugin.session import Host

SIX = Demand({"tcp-ipv4": 6})


class Device:
    """Ten places in each namespace; tells how many are in use as they were when it was asked."""

    def __init__(self) -> None:
        self.in_use = 0
        self.meanwhile: list[Any] = []

    def capabilities(self, scope: Scope | None = None) -> Capabilities:
        told = Capabilities(frozenset(SIX.counts), can_watch=True, capacity=10, in_use=self.in_use, device="memory")
        while self.meanwhile:
            self.meanwhile.pop()()
        return told


def host(device: Device, namespaces: list[str | None]) -> Host:
    made: Any = Host
    scopes = SimpleNamespace(namespaces=lambda: tuple(namespaces))
    peers = SimpleNamespace(way_to=lambda name: SimpleNamespace(domain=None))
    settings = Settings(headroom_percent=0.0)
    built: Host = made("host-b", settings, device, scopes, None, peers, None)
    return built


def promised(made: Host, session: str) -> int:
    return made.risk(SIX, session, "guest", "host-a").carried


def test_place_that_was_promised_before_a_port_showed_where_it_is_is_not_promised_again() -> None:
    namespaces: list[str | None] = []
    made = host(Device(), namespaces)
    assert promised(made, "one") == 6
    namespaces.append("/run/netns/fw")
    assert promised(made, "two") == 4


def test_place_that_was_promised_is_taken_wherever_the_port_turns_out_to_be() -> None:
    device = Device()
    made = host(device, [])
    scope = Scope("port", "guest", {}, (), namespace="/run/netns/fw")
    assert promised(made, "one") == 6
    assert made.take_places("two", scope, 6) == 4
    made.release_places("two")
    assert made.take_places("one", scope, 6) == 6
    made.used_places("one")
    device.in_use = 6
    assert made.places_left("one") == 0
    assert promised(made, "two") == 4


def test_place_that_is_taken_while_the_device_is_asked_is_not_promised_again() -> None:
    device = Device()
    made = host(device, [None])
    assert promised(made, "one") == 6

    def import_six() -> None:
        assert made.take_places("one", Scope("port", "guest", {}, ()), 6) == 6
        device.in_use += 6
        made.used_places("one")

    device.meanwhile.append(import_six)
    assert promised(made, "two") == 4


def test_promise_is_kept_while_what_another_session_takes_gets_into_the_device() -> None:
    device = Device()
    made = host(device, [None])
    scope = Scope("port", "guest", {}, ())
    assert promised(made, "one") == 6
    assert promised(made, "two") == 4
    assert made.take_places("one", scope, 6) == 6
    device.meanwhile.append(lambda: setattr(device, "in_use", 6))
    assert made.take_places("two", scope, 4) == 4
