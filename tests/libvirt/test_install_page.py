"""The page for two hosts with libvirt only, followed to the letter: its files, its commands, its order.

What the lab has instead is said here: no systemd (its lines are carried out by hand), libvirt over TCP, another broker.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab.broker import Broker
from lab.deadline import wait_until
from lab.libvirt import traffic
from lab.libvirt.host import LibvirtHost
from lab.libvirt.lab import LibvirtLab
from lab.verdict import has_survived

pytestmark = pytest.mark.usefixtures("libvirt_here")

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "etc/systemd/sami-agent.service"  # the page includes it
PAGE = (ROOT / "doc/source/install/libvirt.rst").read_text()
SAMI = ROOT / ".venv/bin/sami"
BROKER_OF_THE_PAGE = "rabbit://sami:SECRET@broker:5672/"
WATCHED_SECONDS = 4.0


def blocks(language: str) -> list[str]:
    """The page's code blocks in this language."""
    found = re.findall(rf"\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", PAGE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() for block in found]


def commands(block: str) -> list[str]:
    """What root types in it."""
    return [line[2:] for line in block.splitlines() if line.startswith("# ")]


@pytest.fixture
def hosts(libvirt_here: None, tmp_path: Path) -> Iterator[tuple[LibvirtLab, Broker]]:
    with LibvirtLab(has_hook=False) as lab, Broker(tmp_path) as broker:
        yield lab, broker


def make_certificates(folder: Path) -> None:
    """On the machine that is no compute host, for the lab's hosts a and b."""
    (block,) = (block for block in blocks("console") if "sami pki init" in block)
    for command in commands(block):
        words = re.sub(r"\bhost-([ab])\b", r"\1", command).split()
        subprocess.run([str(SAMI), *words[1:]], cwd=folder, check=True)


def bring_certificates(host: LibvirtHost, folder: Path) -> None:
    """By the page's table of what goes where."""
    rows = re.findall(r"   \* - ``(\S+)``\n     - ``(/etc/sami/tls/\S+)``\n", PAGE)
    assert len(rows) == 4
    host.run(["mkdir", "-p", "/etc/sami/tls"])
    for source, there in rows:
        text = (folder / source.replace("host-a", host.name)).read_text()
        host.run(["sh", "-c", f"umask 077; cat > {there}"], text)


def configure(host: LibvirtHost, broker: Broker) -> None:
    (text,) = (block for block in blocks("ini") if "[DEFAULT]" in block)
    assert BROKER_OF_THE_PAGE in text
    assert "host = host-a" in text
    text = text.replace(BROKER_OF_THE_PAGE, broker.url).replace("host = host-a", f"host = {host.name}")
    host.run(["mkdir", "-p", "/etc/sami"])
    host.run(["tee", "/etc/sami/sami-agent.conf"], text + "\n")
    host.relay(broker.port)


def install_hook(host: LibvirtHost) -> None:
    (block,) = (block for block in blocks("console") if "sami hook install" in block)
    install, reload = commands(block)
    assert (install, reload) == ("sami hook install", "systemctl reload libvirtd")
    said = host.run([str(SAMI), *install.split()[1:]])
    for line in block.splitlines()[1:3]:
        assert line in said, "the page shows what the command says"
    host.run(["sh", "-c", "kill -HUP $(cat /run/libvirtd.pid)"])


def start_agent(host: LibvirtHost) -> subprocess.Popen[bytes]:
    unit = UNIT.read_text()
    (program,) = re.findall(r"^ExecStart=(\S+)$", unit, re.MULTILINE)
    with (host.folder / "agent.log").open("wb") as log:
        return host.start([str(SAMI.with_name(Path(program).name))], stdout=log, stderr=log)


def doctor(host: LibvirtHost) -> dict[str, str]:
    """What it says of each check; it fails as long as anything is missing."""
    said = host.run(["sh", "-c", f"{SAMI} doctor -f json -c Check -c Result || true"])
    return {row["Check"]: row["Result"] for row in json.loads(said)}


def test_who_follows_the_page_migrates_without_losing_a_connection(
    hosts: tuple[LibvirtLab, Broker], tmp_path: Path
) -> None:
    lab, broker = hosts
    guest = lab.add_guest("web", "a")
    # Only systemd could say that libvirtd was reloaded since the hook was put there.
    asked = dict.fromkeys(("certificate", "libvirt-python", "libvirt", "hook", "hook's socket", "socket"), "ok")
    asked["hook is called"] = "limited"
    with ExitStack() as stack:
        make_certificates(tmp_path)
        for host in lab.hosts.values():
            bring_certificates(host, tmp_path)
            configure(host, broker)
            install_hook(host)
            agent = start_agent(host)
            stack.callback(agent.wait)
            stack.callback(agent.terminate)
            wait_until(lambda host=host: doctor(host)["socket"] == "ok", f"the agent of {host.name} to listen", 30)
            found = doctor(host)
            assert {check: found[check] for check in asked} == asked
        flow = traffic.download(lab, guest)
        guest.close_egress()
        began = time.monotonic()
        lab.hosts["a"].run(["virsh", "migrate", "--live", "web", "qemu+tcp://b/system"])
        arrived = lab.journal.wait_for("RESUMED/MIGRATED", "web", "b", began).time
        wait_until(lambda: flow.samples()[-1].time > arrived + WATCHED_SECONDS, "the time that is watched", 30)
        assert has_survived(flow.samples(), arrived, WATCHED_SECONDS)
        b = lab.hosts["b"]
        assert "moved" in b.run([str(SAMI), "session", "list"])
        assert "last changes applied" in b.run([str(SAMI), "report", guest.uuid[:8]])
        for host in lab.hosts.values():
            host.run([str(SAMI), "hook", "remove"])
