"""Tempest itself, with our plugin, against the lab's OpenStack.

    python -m lab.openstack.tempest [--without] [--regex REGEX] [--output build/tempest]

Every migration is held until the destination's rules are in force, as in `lab.openstack.demo`. With --without there is
no SAMI on the hosts, and downloads of servers that move have to die. The output folder gets tempest's configuration,
words and log, in `run`, and the lab's logs. Exit code: tempest's, or 1 when it skipped a test or the lab failed, or 125
when it cannot run here: it takes the machine's root and what `tools/prepare tempest` gets.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lab import isolation
from lab.command import exit_code
from lab.errors import LabUnavailable
from lab.openstack import content, image, parts, settings
from lab.openstack.lab import OpenStackLab
from lab.openstack.router import Router
from lab.openstack.sami import Sami

TEMPEST = parts.FOLDER / "tempest/bin/tempest"
OURS = r"^tempest_tests\."
NETWORK = "net1"
HOLD_SECONDS = 4.0
SERVERS = 4


def check() -> None:
    """Raise LabUnavailable unless all is there."""
    parts.check()
    image.check()
    if not TEMPEST.exists():
        raise LabUnavailable(f"{TEMPEST} is not there", image.HOW)


def configuration(folder: Path, image_id: str) -> settings.Groups:
    """What tempest.conf says; tempest's log and locks are in that folder."""
    return {
        "DEFAULT": {"log_dir": folder, "log_file": "tempest.log"},
        "oslo_concurrency": {"lock_path": folder / "locks"},
        "auth": {
            "admin_username": "admin",
            "admin_project_name": "admin",
            "admin_domain_name": "Default",
            "admin_password": settings.PASSWORD,
            # Users and projects of tempest's own, which share the lab's network.
            "use_dynamic_credentials": "true",
            "create_isolated_networks": "false",
        },
        "identity": {"uri_v3": settings.URLS["identity"], "auth_version": "v3", "region": settings.REGION},
        "service_available": {"cinder": "false", "swift": "false"},
        "compute": {
            "image_ref": image_id,
            "image_ref_alt": image_id,
            "flavor_ref": content.FLAVOR,
            "flavor_ref_alt": content.FLAVOR,
            "fixed_network_name": NETWORK,
            "min_compute_nodes": 2,
            "max_microversion": "latest",
        },
        "compute-feature-enabled": {"live_migration": "true", "block_migration_for_live_migration": "true"},
        "network": {"project_networks_reachable": "true"},
        "validation": {
            "connect_method": "fixed",
            "network_for_ssh": NETWORK,
            "image_ssh_user": image.USER,
            # Nova makes the pair then, not tempest.
            "ssh_key_type": "rsa",
        },
        "sami": {"servers": SERVERS},
    }


def run(lab: OpenStackLab, folder: Path, regex: str) -> int:
    """Run tempest outside of the cloud, as a user would; its words are printed and kept. The exit code."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = folder / "tempest.conf"
    file.write_text(settings.text(configuration(folder.resolve(), image.register(lab.cloud))))
    words = [TEMPEST, "run", "--config-file", file.name, "--regex", regex, "--concurrency", "1"]
    # Nothing of the user's own is read or written; a failure does not repeat what is in the log.
    environment = os.environ | {"HOME": str(folder.resolve()), "OS_LOG_CAPTURE": "0"}
    with lab.outside.inside():
        tempest = subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    said = []
    assert tempest.stdout is not None
    with (folder / "output.txt").open("w") as kept:
        for line in tempest.stdout:
            _say(line.rstrip("\n"))
            kept.write(line)
            said.append(line)
    code = tempest.wait()
    return code or int(has_skipped("".join(said)))


def has_skipped(output: str) -> bool:
    """Whether tempest says that it did not run a test that it found."""
    return re.search(r"^ - Skipped: 0$", output, re.MULTILINE) is None


def _run(options: argparse.Namespace) -> int:
    output: Path = options.output
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(OpenStackLab(_say, logs=output / "logs"))
        stack.enter_context(Router(lab))
        if not options.without:
            _say("SAMI is put on the hosts")
            stack.enter_context(Sami(lab))
        for host in lab.hosts.values():
            stack.enter_context(host.held(HOLD_SECONDS))
        return run(lab, output / "run", options.regex)


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.openstack.tempest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/tempest"), help="folder for all logs (build/tempest)"
    )
    parser.add_argument("--regex", default=OURS, help=f"which tests ({OURS})")
    parser.add_argument("--without", action="store_true", help="no SAMI on the hosts")
    options = parser.parse_args()

    def work() -> int:
        check()
        isolation.enter([sys.executable, "-m", "lab.openstack.tempest", *sys.argv[1:]])
        return _run(options)

    return exit_code(work, f"the lab failed, logs are in {options.output / 'logs'}")


if __name__ == "__main__":
    sys.exit(main())
