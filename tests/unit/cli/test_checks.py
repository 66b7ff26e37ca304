"""What the doctor makes of what it finds; the kernel itself is tried in the functional tests."""

from __future__ import annotations

import socket
from importlib import metadata
from pathlib import Path

import pytest

from sami_plugin.cli import checks, configuration
from sami_plugin.cli.checks import Result
from sami_plugin.drivers.base import Capabilities
from sami_plugin.journal.journal import Journal
from sami_plugin.testing.certificates import Certificates
from tests.unit.cli.broker import Broker
from tests.unit.cli.command_line import CommandLine
from tests.unit.installed import install_broken


def capabilities(capacity: int | None, in_use: int) -> Capabilities:
    return Capabilities(frozenset(), True, capacity, in_use, "device")


@pytest.mark.parametrize(
    ("capacity", "in_use", "result"),
    [(None, 5, Result.OK), (100, 80, Result.OK), (100, 81, Result.LIMITED), (100, 100, Result.MISSING)],
)
def test_table_needs_headroom(capacity: int | None, in_use: int, result: Result) -> None:
    assert checks._headroom(capabilities(capacity, in_use)).result is result


SCTP, UDPLITE, GRE = ({f"{kind}-ipv4", f"{kind}-ipv6"} for kind in ("sctp", "udplite", "gre"))
NAT = {f"{kind}-nat-{family}" for kind in ("tcp", "udp", "icmp") for family in ("ipv4", "ipv6")}
ALL = ["SCTP flows", "UDP-Lite flows", "GRE flows", "flows with a NAT"]


@pytest.mark.parametrize(
    ("kept", "limited"),
    [
        (SCTP | UDPLITE | GRE | NAT, []),
        (SCTP | {"udplite-ipv4"} | NAT, ["UDP-Lite flows", "GRE flows"]),
        (SCTP | UDPLITE | GRE | NAT - {"icmp-nat-ipv6"}, ["flows with a NAT"]),
        (set(), ALL),
        (None, ALL),
    ],
)
def test_protocol_that_the_kernel_lacks_limits_and_breaks_nothing(kept: set[str] | None, limited: list[str]) -> None:
    found = list(checks._optional(None if kept is None else frozenset(kept)))
    assert {check.result for check in found} <= {Result.OK, Result.LIMITED}
    assert [check.name for check in found if check.result is Result.LIMITED] == limited
    assert all(check.mend for check in found if check.result is Result.LIMITED)


def test_journal_is_ok_where_it_is_or_can_be_made(tmp_path: Path) -> None:
    Journal(tmp_path / "journal").close()
    for path in (tmp_path / "journal", tmp_path / "other", tmp_path / "a" / "b" / "journal"):
        assert checks._journal(str(path)).result is Result.OK
    # Nothing is made, but for what SQLite puts beside a database while it reads it.
    assert {path.name for path in tmp_path.iterdir()} <= {"journal", "journal-wal", "journal-shm"}


def test_journal_that_is_none_is_missing(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("words" * 200)
    assert checks._journal(str(tmp_path / "journal")).result is Result.MISSING


def test_socket_is_ok_where_an_agent_listens(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    assert checks._agent_socket(str(path)).result is Result.LIMITED
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert "no agent listens" in checks._agent_socket(str(path)).reason
        listener.listen()
        assert checks._agent_socket(str(path)).result is Result.OK
    assert checks._agent_socket(str(path)).result is Result.LIMITED
    assert checks._agent_socket("/" + "x" * 200).result is Result.MISSING


def test_configuration_that_cannot_be_read_is_missing_and_names_the_file(tmp_path: Path) -> None:
    (found,) = checks._configured([str(tmp_path / "none.conf")])
    assert (found.result, "none.conf" in found.reason) == (Result.MISSING, True)


@pytest.mark.parametrize(
    ("group", "line", "said"),
    [
        ("policy", "default = asking", "there is no policy 'asking'"),
        ("policy", "guests = web:veto", "is no guest's UUID"),
        ("agent", "socket_group = nobody-here", "socket_group: there is no group"),
        ("agent", "socket_users = nobody-here", "socket_users: there is no user"),
        ("agent", "socket_mode = 9999", "socket_mode"),
        ("migration", "hold_seconds = abc", "hold_seconds"),
        ("migration", "verdict_seconds = inf", "verdict_seconds"),
        ("agent", "enterprise_number = 29305", "enterprise_number: 29305 cannot be"),
        ("oslo_messaging_notifications", "driver = telegraph", "there is no 'telegraph'"),
    ],
)
def test_configuration_that_the_agent_would_refuse_is_missing(tmp_path: Path, group: str, line: str, said: str) -> None:
    conf = tmp_path / "agent.conf"

    def configured(*lines: str) -> list[checks.Check]:
        conf.write_text("\n".join([f"[agent]\njournal = {tmp_path}/journal\nsocket = {tmp_path}/socket", *lines]))
        return [one for one in checks._configured([str(conf)]) if one.name == "configuration"]

    assert [one.result for one in configured()] == [Result.OK]
    (found,) = configured(f"[{group}]", line)
    assert (found.result, found.reason.count(said)) == (Result.MISSING, 1)


@pytest.mark.parametrize(
    ("namespace", "text", "row"),
    [
        ("sami.scopes", "[agent]\nscopes = broken\n", "scopes"),
        ("sami.policies", "[policy]\ndefault = broken\n", "configuration"),
    ],
)
def test_plugin_that_cannot_be_imported_is_missing_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespace: str, text: str, row: str
) -> None:
    install_broken(tmp_path, monkeypatch, namespace)
    conf = tmp_path / "agent.conf"
    conf.write_text(f"{text}[agent]\njournal = {tmp_path}/journal\nsocket = {tmp_path}/socket\n")
    (found,) = (one for one in checks._configured([str(conf)]) if one.name == row)
    assert found.result is Result.MISSING
    assert "'broken' cannot be loaded: No module named 'none_such'" in found.reason


def test_scope_file_is_read(tmp_path: Path) -> None:
    ports, conf = tmp_path / "ports.json", tmp_path / "agent.conf"
    conf.write_text(f"[agent]\nscope_file = {ports}\njournal = {tmp_path}/journal\nsocket = {tmp_path}/socket\n")

    def scopes() -> checks.Check:
        return next(one for one in checks._configured([str(conf)]) if one.name == "scopes")

    assert scopes().result is Result.MISSING
    for wrong in ("", "{}", "[]", '{"ports": [{"port": "p", "guest": "g", "zone": 70000, "addresses": []}]}'):
        ports.write_text(wrong)
        assert scopes().result is Result.MISSING
    ports.write_text('{"ports": [{"port": "p", "guest": "g", "zone": 7, "addresses": ["192.0.2.1"]}]}')
    assert scopes().result is Result.OK


def test_extra_that_is_not_installed_is_a_limit_and_named() -> None:
    found = checks._extra("plots", "no_such_module", "nothing is drawn")
    assert found.result is Result.LIMITED
    assert found.mend == "pip install sami_plugin[plots]"


OURS = sorted({point.group for point in metadata.distribution("sami_plugin").entry_points if "sami." in point.group})


@pytest.mark.parametrize("group", OURS)
def test_entry_point_that_does_not_load_is_missing_and_named(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = metadata.EntryPoint("broken", "no_such_module:Driver", group)
    monkeypatch.setattr(checks.metadata, "entry_points", lambda group: [broken] if group == broken.group else [])
    (found,) = (one for one in checks._entry_points() if one.name == f"entry points {group}")
    assert (found.result, "broken: ModuleNotFoundError" in found.reason) == (Result.MISSING, True)


def test_doctor_exits_with_1_only_if_something_is_missing(sami: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    for result, code in ((Result.OK, 0), (Result.LIMITED, 0), (Result.MISSING, 1)):
        found = [checks.Check("one", result, "why", "mend")]
        monkeypatch.setattr(checks, "all_checks", lambda files, found=found: found)
        assert sami("doctor", "-f", "value") == code
        assert sami.out == f"one {result.value} why mend\n"


def test_driver_that_cannot_be_used_is_a_row_with_the_reason(
    sami: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sami_plugin.errors import NotPermitted

    def load(name: str) -> object:
        if name == "memory":
            return sami.driver
        raise NotPermitted("not for you")

    monkeypatch.setattr(sami, "load_driver", load)
    assert sami("driver", "list", "-f", "csv", "-c", "Name", "-c", "Usable", "-c", "Notes") == 0
    assert '"linux_conntrack",False,' in sami.out
    assert "not for you" in sami.out
    assert '"memory",True,' in sami.out


def test_domain_s_files_and_broker_are_looked_at(tmp_path: Path, broker: Broker) -> None:
    own, west = Certificates(tmp_path / "own"), Certificates(tmp_path / "west")
    files = own.files("host-a")
    path = tmp_path / "agent.conf"

    def look(**options: object) -> checks.Check:
        values = {
            "hosts": "*.west.example",
            "authorities": west.folder / "ca.pem",
            "revoked": west.folder / "crl.pem",
            "transport_url": f"rabbit://u:p@127.0.0.1:{broker.port}/",
            **options,
        }
        path.write_text(
            f"[agent]\nhost = host-a\ndomains = west\n[tls]\ncertificate = {files.certificate}\nkey = {files.key}\n"
            "[domain:west]\n" + "".join(f"{option} = {value}\n" for option, value in values.items())
        )
        (found,) = checks._domains(configuration.load([str(path)]), [str(path)])
        return found

    assert look().result is Result.OK
    assert look(revoked="").result is Result.LIMITED
    missing = look(authorities=tmp_path / "nothing.pem")
    assert missing.result is Result.MISSING
    assert "[domain:west] authorities" in missing.reason
    silent = look(transport_url="rabbit://u:secret@127.0.0.1:9/")
    assert silent.result is Result.MISSING
    assert "[domain:west] transport_url" in silent.mend
    assert "secret" not in silent.reason
    assert "there is no policy 'asking'" in look(policy="asking").reason
    unfinished = look(hosts="")
    assert (unfinished.name, unfinished.result) == ("domains", Result.MISSING)
    assert "[domain:west] hosts: has to be set" in unfinished.reason
    undecided = look(peers_follow="maybe")
    assert (undecided.name, undecided.result) == ("domains", Result.MISSING)
    assert undecided.reason.startswith("Value for option peers_follow from ")


def test_capabilities_are_those_that_the_ports_take(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = checks._capabilities([])
    assert alone.result is Result.OK
    assert "CAP_SYS_ADMIN" not in alone.reason
    for has, result in ((True, Result.OK), (False, Result.MISSING)):
        monkeypatch.setattr(checks, "_has_capability", lambda number, has=has: has)
        both = checks._capabilities(["/run/netns/qrouter-1"])
        assert both.result is result
        assert "CAP_SYS_ADMIN to enter 1 network namespaces, /run/netns/qrouter-1" in both.reason
