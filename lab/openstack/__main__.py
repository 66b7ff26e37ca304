"""A lab to look at: `python -m lab.openstack [--sami]` brings it up and keeps it until it is interrupted."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys

from lab import isolation
from lab.command import exit_code
from lab.openstack import parts
from lab.openstack.lab import OpenStackLab
from lab.openstack.sami import Sami
from lab.openstack.settings import PASSWORD, REGION, URLS


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lab.openstack", description=__doc__)
    parser.add_argument("--sami", action="store_true", help="put SAMI on the hosts")
    parser.add_argument("--new", action="store_true", help="do not use what was kept of an earlier lab")
    options = parser.parse_args()

    def work() -> int:
        parts.check()
        isolation.enter([sys.executable, "-m", "lab.openstack", *sys.argv[1:]])
        with contextlib.ExitStack() as stack:
            lab = stack.enter_context(OpenStackLab(_say, is_new=options.new))
            if options.sami:
                stack.enter_context(Sami(lab))
            _say(f"Keystone is at {URLS['identity']}, region {REGION}; user, project admin, password {PASSWORD}")
            _say("To enter a machine, as root of this one, find its first process and go where it is:")
            _say(f"  nsenter -m -u -p -n -t $(pgrep -f 'first.py a {lab.folder}' | tail -1)")
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
        return 0

    return exit_code(work, "the lab failed")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
