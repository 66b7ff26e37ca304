"""The file of ports: what it may say, and what it says of a guest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import netaddr
import pytest

from sami_plugin.errors import ConfigurationError
from sami_plugin.model.flows import ZoneRole
from sami_plugin.model.scope import Scope
from sami_plugin.scopes.static import StaticScopes

WEB = {"port": "tap-web", "guest": "web", "zone": 7, "addresses": ["192.0.2.7", "2001:db8::7"]}
DB = {"port": "tap-db", "guest": "db", "zone": 9, "shared": True, "addresses": ["192.0.2.8"], "namespace": "/run/fw"}

Write = Callable[[object], StaticScopes]


@pytest.fixture
def scopes_of(tmp_path: Path) -> Write:
    def write(said: object) -> StaticScopes:
        path = tmp_path / "ports.json"
        path.write_text(said if isinstance(said, str) else json.dumps(said))
        return StaticScopes(path)

    return write


def test_scopes_of_a_guest(scopes_of: Write) -> None:
    scopes = scopes_of({"ports": [WEB, DB, {**WEB, "port": "tap-2", "zone": 8}]})
    addresses = (netaddr.IPAddress("192.0.2.7"), netaddr.IPAddress("2001:db8::7"))
    assert scopes.find("web") == (
        Scope("tap-web", "web", {ZoneRole.PORT: 7}, addresses),
        Scope("tap-2", "web", {ZoneRole.PORT: 8}, addresses),
    )
    (found,) = scopes.find("db")
    assert (found.namespace, found.is_shared, found.zones) == ("/run/fw", True, {ZoneRole.PORT: 9})
    assert scopes.find("nobody") == ()


def test_addresses_that_a_port_s_are_translated_to(scopes_of: Write) -> None:
    scopes = scopes_of({"ports": [{**WEB, "translations": ["203.0.113.7", "2001:db8:f::7"]}, DB]})
    assert scopes.find("web")[0].translations == (netaddr.IPAddress("203.0.113.7"), netaddr.IPAddress("2001:db8:f::7"))
    assert scopes.find("db")[0].translations == ()


def test_zone_of_a_router_has_its_role(scopes_of: Write) -> None:
    scopes = scopes_of({"ports": [WEB, {**WEB, "port": "tap-web@router", "zone": 70, "role": "dnat", "shared": True}]})
    assert [scope.zones for scope in scopes.find("web")] == [{ZoneRole.PORT: 7}, {ZoneRole.DNAT: 70}]


def test_neighbours_of_a_router_s_zone_are_those_of_its_entries(scopes_of: Write) -> None:
    routed = {"role": "snat", "zone": 70, "shared": True}
    scopes = scopes_of(
        {"ports": [{**WEB, **routed}, {**WEB, **routed, "port": "tap-db@router", "addresses": ["192.0.2.8"]}]}
    )
    assert scopes.neighbours(scopes.find("web")[0]) == (netaddr.IPAddress("192.0.2.8"),)


def test_file_is_read_anew_at_each_question(scopes_of: Write) -> None:
    scopes = scopes_of({"ports": []})
    assert scopes.find("web") == ()
    scopes_of({"ports": [WEB]})
    assert len(scopes.find("web")) == 1


def test_neighbours_are_the_other_ports_of_the_same_zone_and_namespace(scopes_of: Write) -> None:
    scopes = scopes_of(
        {
            "ports": [
                DB,
                {**DB, "port": "tap-3", "guest": "x", "addresses": ["192.0.2.9", "2001:db8::9"]},
                {**DB, "port": "other zone", "zone": 10, "addresses": ["192.0.2.10"]},
                {**DB, "port": "other namespace", "namespace": "/run/other", "addresses": ["192.0.2.11"]},
                {**DB, "port": "the agent's own", "namespace": None, "addresses": ["192.0.2.12"]},
            ]
        }
    )
    scope = scopes.find("db")[0]
    assert [str(address) for address in scopes.neighbours(scope)] == ["192.0.2.9", "2001:db8::9"]


def test_namespaces_are_told_once_each(scopes_of: Write) -> None:
    scopes = scopes_of({"ports": [WEB, DB, {**DB, "port": "tap-3"}]})
    assert scopes.namespaces() == (None, "/run/fw")


@pytest.mark.parametrize("zone", [0, 65535])
def test_zone_may_be_any_number_of_16_bits(scopes_of: Write, zone: int) -> None:
    assert scopes_of({"ports": [{**WEB, "zone": zone}]}).find("web")[0].zones == {ZoneRole.PORT: zone}


BAD = [
    "",
    "{",
    "[]",
    "null",
    {},
    {"ports": None},
    {"ports": 7},
    {"ports": ["tap-web"]},
    {"ports": [None]},
    *({"ports": [{**WEB, "zone": zone}]} for zone in (-1, 65536, "7", 7.0, True, None)),
    *({"ports": [{**WEB, "role": role}]} for role in ("router", 2, None, [])),
    *({"ports": [{name: value for name, value in WEB.items() if name != missing}]} for missing in WEB),
    *(
        {"ports": [{**WEB, field: wrong}]}
        for field in ("addresses", "translations")
        for wrong in (None, 7, ["192.0.2"], ["192.0.2.0/9"], [None], [[]], [7])
    ),
]  # fmt: skip


@pytest.mark.parametrize("said", BAD, ids=range(len(BAD)))
def test_file_that_cannot_be_read_is_refused_by_name(scopes_of: Write, said: object) -> None:
    scopes = scopes_of(said)
    for ask in (lambda: scopes.find("nobody"), scopes.namespaces):
        with pytest.raises(ConfigurationError, match=r"scope_file .*ports\.json: "):
            ask()


def test_text_where_a_list_of_addresses_belongs_is_refused(scopes_of: Write) -> None:
    with pytest.raises(ConfigurationError):
        scopes_of({"ports": [{**WEB, "addresses": "12"}]}).find("web")


@pytest.mark.parametrize("shared", ["no", "false", 0, 1, None])
def test_shared_is_true_or_false_and_nothing_that_looks_like_it(scopes_of: Write, shared: object) -> None:
    with pytest.raises(ConfigurationError, match="shared"):
        scopes_of({"ports": [{**WEB, "shared": shared}]}).find("web")


@pytest.mark.parametrize("role", ["port", "dnat"])
def test_zone_0_of_the_host_is_shared_although_the_file_does_not_say_so(scopes_of: Write, role: str) -> None:
    (scope,) = scopes_of({"ports": [{**WEB, "zone": 0, "role": role}]}).find("web")
    assert scope.is_shared


def test_zone_0_of_the_host_is_refused_as_a_port_s_own(scopes_of: Write) -> None:
    with pytest.raises(ConfigurationError, match=r"'tap-web' cannot have zone 0 for itself, .*write \"shared\": true"):
        scopes_of({"ports": [{**WEB, "zone": 0, "shared": False}]}).find("web")


def test_zone_0_of_another_namespace_may_be_a_port_s_own(scopes_of: Write) -> None:
    (scope,) = scopes_of({"ports": [{**WEB, "zone": 0, "namespace": "/run/fw"}]}).find("web")
    assert not scope.is_shared


@pytest.mark.parametrize("namespace", ["", 7, ["/run/fw"]])
def test_namespace_is_a_path(scopes_of: Write, namespace: object) -> None:
    with pytest.raises(ConfigurationError, match="namespace"):
        scopes_of({"ports": [{**WEB, "namespace": namespace}]}).find("web")


def test_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ports"):
        StaticScopes(tmp_path / "ports.json").find("web")


@pytest.mark.parametrize("field", ["port", "guest", "zone", "addresses"])
def test_what_a_port_has_to_have_is_named(scopes_of: Write, field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'{field}' is missing"):
        scopes_of({"ports": [{name: value for name, value in WEB.items() if name != field}]}).find("web")


def test_file_of_the_documentation_is_one(scopes_of: Write) -> None:
    page = (Path(__file__).parents[3] / "doc/source/user/scopes.rst").read_text()
    shown = page.partition(".. code-block:: json\n")[2].partition("``port``, ``guest``")[0]
    (scope,) = scopes_of(shown).find("6ac31f0e-8c1f-4f5e-9d0b-0d6d3a9b7c11")
    assert (scope.zones, scope.namespace, scope.translations) == (
        {ZoneRole.PORT: 4097},
        "/run/netns/fw",
        (netaddr.IPAddress("203.0.113.9"),),
    )
