"""The command `sami` as a user starts it, against the kernel. Needs CAP_SYS_ADMIN and CAP_NET_ADMIN."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import netaddr
import pytest

from benchmarks.floor import namespaces
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver
from sami_plugin.model.flows import TEMPLATES, ZoneRole
from sami_plugin.model.scope import Scope
from sami_plugin.testing.certificates import Certificates
from sami_plugin.testing.conformance import PORT_ADDRESSES, flows

SAMI = (sys.executable, "-m", "sami_plugin.cmd.cli")
ORDINARY_USER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
KERNEL_CHECKS = ("events", "flows over IPv4", "flows over IPv6", "UDP flows", "marks", "removal", "nf_conntrack")


def run(*arguments: object, as_ordinary_user_in: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*SAMI, *map(str, arguments)]
    if as_ordinary_user_in is not None:
        command = [*ORDINARY_USER, str(as_ordinary_user_in / ".venv/bin/python"), *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100, cwd=as_ordinary_user_in)
    assert "Traceback" not in done.stderr
    return done


def table(*arguments: object, code: int = 0, as_ordinary_user_in: Path | None = None) -> list[dict[str, Any]]:
    done = run(*arguments, "-f", "json", as_ordinary_user_in=as_ordinary_user_in)
    assert done.returncode == code, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


@pytest.fixture
def places() -> Iterator[list[str]]:
    """Two network namespaces; the first has 70 flows of the guest in zone 5."""
    with namespaces() as paths:
        driver = LinuxConntrackDriver()
        scope = Scope("port", "guest", {ZoneRole.PORT: 5}, PORT_ADDRESSES, paths[0])
        for name, count in (("tcp-ipv4", 40), ("tcp-ipv6", 10), ("udp-ipv4", 10), ("icmp-ipv6", 10)):
            made = driver.insert(scope, flows(TEMPLATES[name], count))
            assert not made["reason"].any()
        driver.close()
        yield paths


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        assert 0 < row.pop("Timeout") <= 600
    return sorted(rows, key=str)


def test_flows_go_through_a_file_into_another_namespace_and_zone(places: list[str], tmp_path: Path) -> None:
    here, there = places
    file = tmp_path / "flows.ipfix"
    exported = run("flow", "export", file, "--namespace", here, "--zone", 5)
    assert (exported.returncode, exported.stderr) == (0, "")
    assert table("flow", "import", file, "--namespace", there, "--zone", 9, "--dry-run")[0]["Flows"] == 70
    assert table("flow", "list", "--namespace", there, "--zone", 9) == []
    (imported,) = table("flow", "import", file, "--namespace", there, "--zone", 9)
    assert (imported["Result"], imported["Flows"]) == ("imported", 70)
    # Once more is harmless.
    assert table("flow", "import", file, "--namespace", there, "--zone", 9)[0]["Flows"] == 70
    before = without_time(table("flow", "list", "--namespace", here, "--zone", 5))
    assert len(before) == 70
    assert without_time(table("flow", "list", "--namespace", there, "--zone", 9)) == before
    assert table("flow", "list", "--namespace", there, "--zone", 5) == []


def test_only_flows_of_the_given_address_are_imported(places: list[str], tmp_path: Path) -> None:
    here, there = places
    file = tmp_path / "flows.ipfix"
    assert run("flow", "export", file, "--namespace", here, "--zone", 5).returncode == 0
    address = next(one for one in PORT_ADDRESSES if one.version == 6)
    rows = table("flow", "import", file, "--namespace", there, "--zone", 9, "--address", address, code=1)
    assert [(row["Result"], row["Flows"]) for row in rows] == [("imported", 20), ("refused", 50)]
    listed = table("flow", "list", "--namespace", there, "--zone", 9)
    assert len(listed) == 20
    assert all(str(netaddr.IPAddress(address)) in row["Source"] for row in listed)


def test_file_that_is_cut_short_changes_nothing(places: list[str], tmp_path: Path) -> None:
    here, there = places
    file = tmp_path / "flows.ipfix"
    assert run("flow", "export", file, "--namespace", here, "--zone", 5).returncode == 0
    file.write_bytes(file.read_bytes()[:-10])
    done = run("flow", "import", file, "--namespace", there, "--zone", 9)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert table("flow", "list", "--namespace", there, "--zone", 9) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("flow", "list", "--zone", 1, "--namespace", "no-such-namespace"), 1),
        (("flow", "list", "--zone", 1, "--namespace", "/etc/passwd"), 1),
        (("flow", "list", "--zone", 1, "--driver", "no-such-driver"), 1),
        (("flow", "list", "--zone", 1, "--shared"), 1),
        (("flow", "export", "/no/such/folder/file", "--zone", 1), 1),
        (("flow", "import", "/no/such/file", "--zone", 1), 1),
        (("flow", "import", "/etc/passwd", "--zone", 1), 1),
        (("session", "list", "--journal", "/etc/passwd"), 1),
        (("session", "show", "1", "--journal", "/no/such/file"), 1),
        (("report", "1", "--journal", "/no/such/file"), 1),
        (("session", "list", "--config-file", "/no/such/file"), 1),
        (("hook", "install", "--folder", "/no/such/hooks/qemu.d"), 1),
        (("hook", "install", "--name", "a/b"), 1),
        (("hook", "remove", "--folder", "/etc/passwd"), 1),
        (("hook", "status", "--config-file", "/no/such/file"), 1),
        (("flow", "list"), 2),
        (("flow", "list", "--zone", "seven"), 2),
        (("driver", "list", "-f", "no-such-format"), 2),
        (("doctor", "surplus"), 2),
        (("hook", "remove", "surplus"), 2),
        (("no-such-command",), 2),
    ],
)
def test_wrong_arguments_end_in_one_line_that_says_why(arguments: tuple[object, ...], code: int) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert done.stdout == ""
    *usage, message = done.stderr.splitlines()
    assert message.startswith("sami")
    assert not usage or usage[0].startswith("usage: sami ")


@pytest.mark.usefixtures("machine_root")
def test_driver_list_is_of_use_to_an_ordinary_user(open_clone: Path) -> None:
    usable = {row["Name"]: row["Usable"] for row in table("driver", "list")}
    assert usable == {"deposit": True, "linux_conntrack": True, "memory": True, "nft_sets": True, "pcp": True}
    ordinary = {row["Name"]: row for row in table("driver", "list", as_ordinary_user_in=open_clone)}
    assert ordinary["memory"]["Usable"]
    assert not ordinary["linux_conntrack"]["Usable"]
    assert "CAP_NET_ADMIN" in ordinary["linux_conntrack"]["Notes"][0]


@pytest.mark.usefixtures("machine_root")
def test_ordinary_user_is_told_what_listing_flows_takes(open_clone: Path) -> None:
    done = run("flow", "list", "--zone", 1, as_ordinary_user_in=open_clone)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "CAP_NET_ADMIN" in done.stderr


def test_doctor_of_root_has_tried_everything(tmp_path: Path) -> None:
    ports = tmp_path / "ports.json"
    ports.write_text('{"ports": []}')
    conf = tmp_path / "agent.conf"
    conf.write_text(
        f"[DEFAULT]\ntransport_url = fake://\n[agent]\nscope_file = {ports}\n"
        f"journal = {tmp_path}/journal\nsocket = {tmp_path}/socket\nhost = a\n[tls]\n"
        + "".join(f"{option} = {path}\n" for option, path in asdict(Certificates(tmp_path / "pki").files("a")).items())
    )
    rows = {row["Check"]: row for row in table("doctor", "--config-file", conf)}
    assert {name: rows[name]["Result"] for name in KERNEL_CHECKS} == dict.fromkeys(KERNEL_CHECKS, "ok")
    assert rows["configuration"]["Result"] == "ok"
    assert {"SCTP flows", "UDP-Lite flows", "GRE flows", "flows with a NAT"} <= rows.keys()
    assert all(row["Mend"] for row in rows.values() if row["Result"] == "missing")


def test_doctor_leaves_no_file_behind(tmp_path: Path) -> None:
    conf = tmp_path / "agent.conf"
    conf.write_text(f"[agent]\njournal = {tmp_path}/journal\nsocket = {tmp_path}/socket\n")
    assert run("doctor", "--config-file", conf).returncode == 1  # no ports.json, no broker
    assert sorted(tmp_path.iterdir()) == [conf]


@pytest.mark.usefixtures("machine_root")
def test_doctor_of_an_ordinary_user_says_what_is_missing(open_clone: Path) -> None:
    rows = {row["Check"]: row for row in table("doctor", code=1, as_ordinary_user_in=open_clone)}
    assert rows["CAP_NET_ADMIN"]["Result"] == rows["nf_conntrack"]["Result"] == "missing"
    assert rows["trial namespace"]["Result"] == "limited"
    assert "events" not in rows
    assert rows["CAP_NET_ADMIN"]["Mend"]


def test_hook_is_installed_looked_at_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "hooks" / "qemu.d"
    place = ("--folder", folder)
    shown = run("hook", "status", *place, "-f", "json")
    assert (shown.returncode, json.loads(shown.stdout)["installed"]) == (1, "no")
    assert run("hook", "install", *place).returncode == 0
    called = subprocess.run([folder / "50-sami", "web", "start", "begin", "-"], capture_output=True, check=False)
    assert (called.returncode, called.stdout, called.stderr) == (0, b"", b"")
    assert json.loads(run("hook", "status", *place, "-f", "json").stdout)["installed"] == "yes"
    assert run("hook", "remove", *place).returncode == 0
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("machine_root")
def test_ordinary_user_is_told_that_hooks_are_root_s(open_clone: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # noqa: S103 - the user has to see that there is no hook
        os.makedirs(f"{folder}/libvirt/hooks/qemu.d")
        place = ("--folder", f"{folder}/libvirt/hooks/qemu.d")
        done = run("hook", "install", *place, as_ordinary_user_in=open_clone)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "run as root" in done.stderr
        assert os.listdir(f"{folder}/libvirt/hooks/qemu.d") == []


@pytest.mark.parametrize("what", [("list",), ("export", "flows.ipfix")])
def test_reader_that_goes_away_is_no_error(places: list[str], what: tuple[str, ...], tmp_path: Path) -> None:
    """Whether cliff notices, or nobody before the last of the output is on its way."""
    read, write = os.pipe()
    os.close(read)
    command = [*SAMI, "flow", *what, "--namespace", places[0], "--zone", "5"]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    environment.pop("PYTHONUNBUFFERED", None)
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run(
            command, stdout=pipe, stderr=subprocess.PIPE, check=False, timeout=100, cwd=tmp_path, env=environment
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_interrupt_ends_quietly_with_130(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Reading from a pipe that nobody writes to lasts until it is interrupted.
    process = subprocess.Popen(
        [*SAMI, "flow", "import", str(fifo), "--zone", "1"],
        stderr=subprocess.PIPE,
        # A shell has what it runs in the background ignore it, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        writer = os.open(fifo, os.O_WRONLY)  # blocks until the command reads
        process.send_signal(signal.SIGINT)
        os.close(writer)  # where the signal came between two reads, this ends the next one, and then it counts
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, said) == (130, b"")
