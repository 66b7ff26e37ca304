"""The worked example of a vendor's driver, as it is installed from its own wheel, in examples/acme-firewall."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sami_plugin.drivers.base import FlowDriver
from sami_plugin.drivers.deposit import DepositDriver
from sami_plugin.drivers.memory import MemoryDevice, MemoryDriver
from sami_plugin.drivers.several import SeveralDrivers
from sami_plugin.model.flows import TEMPLATES, Batch
from sami_plugin.model.kinds import bring
from sami_plugin.model.results import Outcome, lost_fields
from sami_plugin.testing.conformance import flows
from sami_plugin.testing.hosts import Hosts
from tests.unit.handover.memory import SETTINGS, ZONES, begin, finish, guest_with_flows, until_idle, zone_scope

EXAMPLE = Path(__file__).parents[2] / "examples" / "acme-firewall"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is installed, and nothing else."""
    folder = tmp_path_factory.mktemp("acme")
    source, site = folder / "source", folder / "site"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", site, wheel], check=True)
    return site


def run(site: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(site.parent)}
    words = (sys.executable, "-m", *words)
    return subprocess.run(words, cwd=site.parent, env=environment, capture_output=True, text=True, check=False)  # type: ignore[arg-type]


def test_driver_as_installed_keeps_the_contract(site: Path) -> None:
    done = run(site, "pytest", "-q", "-p", "no:cacheprovider", site.parent / "source" / "tests")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_driver_as_installed_is_found_by_name(site: Path) -> None:
    done = run(site, "sami_plugin.cmd.cli", "driver", "list")
    assert "acme" in done.stdout, done.stderr


@pytest.fixture
def hosts(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """The first has ACME's firewall, the others have another vendor's."""
    monkeypatch.syspath_prepend(str(site))
    from sami_acme.device import Appliance  # type: ignore[import-not-found]
    from sami_acme.driver import AcmeDriver  # type: ignore[import-not-found]
    from sami_acme.kinds import KINDS  # type: ignore[import-not-found]

    bring(KINDS)
    device = Appliance()

    def driver_of(name: str) -> FlowDriver:
        if name == "host-a":
            made: FlowDriver = AcmeDriver(device.url)
            return made
        others = MemoryDriver(MemoryDevice(name)), DepositDriver(str(tmp_path / f"deposit-{name}"))
        return SeveralDrivers(tuple(zip(("firewall", "deposit"), others, strict=True)))

    with Hosts(tmp_path, tuple(ZONES), driver_of, settings=SETTINGS) as made:
        yield made
    device.close()


def keys(hosts: Hosts, host: str) -> set[bytes]:
    """Of the flows that the guest's zone has in the host's firewall."""
    batches = [part for part in hosts.drivers[host].export(zone_scope(host)) if isinstance(part, Batch)]
    return {row.tobytes()[: batch.template.key_octets] for batch in batches for row in batch.rows}


def test_flows_move_from_one_vendor_s_firewall_to_another_s_and_back(hosts: Hosts) -> None:
    guest = guest_with_flows(hosts)
    before = keys(hosts, "host-a")
    assert len(before) == 100
    for here, there in (("host-a", "host-b"), ("host-b", "host-a")):
        begin(hosts, guest, here, there)
        finish(hosts, guest, here, there)
        until_idle(hosts)
        assert (keys(hosts, here), keys(hosts, there)) == (set(), before)


def test_what_only_one_vendor_knows_waits_at_the_other_s_and_comes_back(hosts: Hosts) -> None:
    guest = guest_with_flows(hosts)
    scopes = {"host-a": hosts.scope("host-a", guest)}
    bans = flows(TEMPLATES["acme-ban-ipv4"], 3, source=scopes["host-a"].addresses)
    bans.rows["acmeReason"], bans.rows["acmeScore"] = 7, [10, 50, 90]
    assert set(hosts.drivers["host-a"].insert(scopes["host-a"], bans)["outcome"]) == {Outcome.IMPORTED}
    for here, there in (("host-a", "host-b"), ("host-b", "host-a")):
        begin(hosts, guest, here, there)
        finish(hosts, guest, here, there)
        until_idle(hosts)
        scopes[there] = hosts.scope(there, guest)
        found, is_there = hosts.drivers[there].read_back(scopes[there], bans)
        assert is_there.all()
        assert not lost_fields(bans, found.rows).any()
        assert not hosts.drivers[here].read_back(scopes[here], bans)[1].any()
        report = hosts.reports(there, guest)[0]["flows"]
        assert (report["imported"], report["refused"]) == (103, 0)
