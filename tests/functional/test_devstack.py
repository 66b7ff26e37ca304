"""The devstack plugin's own phases, as devstack runs them, with real parts: broker, agent, files, libvirt's hook."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
from oslo_config import cfg

from lab import isolation
from lab.broker import Broker
from lab.deadline import wait_until

ROOT = pathlib.Path(__file__).parents[2]
BEFORE = """
[DEFAULT]
host = cmp1

[oslo_messaging_notifications]
driver = messagingv2
topics = notifications

[libvirt]
virt_type = qemu
"""


class Host:
    """A host that devstack stacks."""

    def __init__(self, folder: pathlib.Path, transport_url: str) -> None:
        self.folder = folder
        self.nova_conf = folder / "nova.conf"
        self.nova_conf.write_text(BEFORE)
        self.configuration = folder / "etc" / "sami-agent.conf"
        self.hook = folder / "hooks" / "50-sami"
        self.pid = folder / "sami-agent.pid"
        self.settings = {
            "DEST": str(ROOT.parent),
            "SAMI_DIR": str(ROOT),
            "DATA_DIR": str(folder / "data"),
            "STACK_USER": "root",
            "NOVA_CONF": str(self.nova_conf),
            "RABBIT_URL": transport_url,
            "PYTHON_BIN": str(pathlib.Path(sys.executable).parent),
            "RUN": str(folder),
            "SAMI_CONF_DIR": str(folder / "etc"),
            "SAMI_STATE_DIR": str(folder / "state"),
            "SAMI_LIBVIRT_HOOKS": str(folder / "hooks"),
            "SAMI_HOST": "cmp1",
            "Q_AGENT": "linuxbridge",
        }

    def devstack(self, *words: str) -> str:
        done = subprocess.run(
            [ROOT / "lab" / "devstack.sh", *words],
            env=os.environ | self.settings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def stack(self) -> None:
        for phase in ("pre-install", "install", "post-config", "extra", "test-config"):
            self.devstack("stack", phase)

    def status(self) -> dict[str, object]:
        command = [sys.executable, "-m", "sami_plugin.cmd.cli", "status", "-f", "json"]
        done = subprocess.run(
            [*command, "--config-file", str(self.configuration)], capture_output=True, text=True, check=True
        )
        return dict(json.loads(done.stdout))

    def notification_drivers(self) -> list[str]:
        """As Nova reads them."""
        conf = cfg.ConfigOpts()
        conf.register_opts([cfg.MultiStrOpt("driver", default=[])], group="oslo_messaging_notifications")
        conf(["--config-file", str(self.nova_conf)], project="nova")
        return list(conf.oslo_messaging_notifications.driver)


@pytest.fixture
def host(tmp_path: pathlib.Path) -> Iterator[Host]:
    if not isolation.is_inside():
        pytest.fail("run it in a world of lab.isolation", pytrace=False)
    with Broker(tmp_path / "broker") as broker:
        made = Host(tmp_path, broker.url)
        yield made
        if made.pid.exists():
            made.devstack("unstack")


def test_host_is_stacked_unstacked_and_clean(host: Host) -> None:
    host.stack()
    assert host.notification_drivers() == ["messagingv2", "sami"]
    assert os.access(host.hook, os.X_OK)
    wait_until(lambda: pathlib.Path("/run/sami/agent.sock").exists(), "the agent to listen", 30)
    status = host.status()
    assert (status["host"], status["agent"]) == ("cmp1", "listens at /run/sami/agent.sock")
    assert host.configuration.stat().st_mode & 0o777 == 0o600
    assert (host.configuration.parent / "libvirt-hook.conf").read_text() == "veto = no\n"
    pid = int(host.pid.read_text())
    host.devstack("unstack")
    assert not pathlib.Path(f"/proc/{pid}").exists()
    assert not host.hook.exists()
    host.devstack("clean")
    left = {one.name for one in host.folder.iterdir()}
    assert not left & {"etc", "state"}
    assert not pathlib.Path("/run/sami").exists()


def test_host_that_is_stacked_again_has_everything_once(host: Host) -> None:
    host.stack()
    host.devstack("unstack")
    host.nova_conf.write_text(BEFORE)  # devstack makes it anew
    certificate = (host.folder / "etc" / "tls" / "host.pem").read_bytes()
    host.stack()
    assert host.notification_drivers() == ["messagingv2", "sami"]
    assert (host.folder / "etc" / "tls" / "host.pem").read_bytes() == certificate
    assert host.configuration.read_text().count("scopes = ") == 1


def test_host_without_guests_is_left_alone(host: Host) -> None:
    host.settings["SERVICES"] = "n-api"
    host.stack()
    assert not host.configuration.exists()
