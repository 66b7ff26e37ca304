"""A lab of real libvirt hosts for a person to look at; see --help."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time

from lab import isolation
from lab.errors import LabError, LabUnavailable
from lab.isolation import EXIT_UNAVAILABLE
from lab.libvirt import parts, state
from lab.libvirt.lab import KINDS, LibvirtLab
from lab.libvirt.state import Up

LOG = parts.FOLDER / "up.log"
POLL_SECONDS = 0.1
HINT = """Once it is up, for example:
  python -m lab.libvirt shell a                    a shell in host a
  python -m lab.libvirt shell a -- virsh list
  python -m lab.libvirt shell a -- virsh migrate --live --p2p g qemu+tcp://b/system
"""


def main() -> int:
    """Run the command line; 125 where the lab cannot run."""
    options = parse(sys.argv[1:])
    try:
        return options.run(options)
    except LabUnavailable as error:
        print(error, file=sys.stderr)
        return EXIT_UNAVAILABLE
    except LabError as error:
        print(error, file=sys.stderr)
        return 1


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `run` is what to do."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.libvirt",
        description="Real libvirt hosts on this machine, in namespaces: nothing of the machine is changed.",
        epilog=HINT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="up|down|status|shell")
    bring = commands.add_parser("up", help="bring up a lab, until Ctrl-C or down")
    bring.add_argument("--detach", action="store_true", help="return when it is up; it goes on until down")
    bring.add_argument("--host", action="append", metavar="NAME", help="a host; may be repeated (default: a and b)")
    bring.add_argument("--kind", choices=KINDS, default="bridge", help="conntrack zones: one per port, or one shared")
    bring.add_argument("--guest", action="append", default=[], metavar="NAME", help="a guest on the first host")
    bring.set_defaults(run=up)
    commands.add_parser("down", help="end it").set_defaults(run=down)
    commands.add_parser("status", help="its hosts and guests").set_defaults(run=status)
    shell_parser = commands.add_parser("shell", help="a shell, or a command, inside of a host")
    shell_parser.add_argument("host")
    shell_parser.add_argument("command", nargs="*", help="after --; default: bash")
    shell_parser.set_defaults(run=shell)
    return parser.parse_args(argv)


def up(options: argparse.Namespace) -> int:
    """Bring up a lab: in the background, or here; then this process is the one that `down` ends."""
    if isolation.is_inside():
        return stay_up(options)
    parts.check()
    if state.find() is not None:
        raise LabError("a lab is up already; end it with: python -m lab.libvirt down")
    if options.detach:
        return detach()
    Up(os.getpid(), state.started_at(os.getpid()) or 0, {}).write()
    try:
        isolation.enter([sys.executable, "-m", "lab.libvirt", *sys.argv[1:]])
    finally:
        state.FILE.unlink(missing_ok=True)
    return 0


def stay_up(options: argparse.Namespace) -> int:
    """In the world: the lab itself, until SIGTERM or SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    with LibvirtLab(hosts=options.host or ("a", "b"), kind=options.kind) as lab:
        first = next(iter(lab.hosts))
        for name in options.guest:
            guest = lab.add_guest(name, first)
            print(f"guest {name} on {first}: {' '.join(guest.ports[0].addresses)}", flush=True)
        dataclasses.replace(state.read(), hosts={name: host.pid for name, host in lab.hosts.items()}).write()
        print(f"up: hosts {' '.join(lab.hosts)}\n{HINT}", flush=True)
        signal.pause()
    return 0


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def detach() -> int:
    """Run the same command without --detach in the background; return when the lab is up."""
    words = [word for word in sys.argv[1:] if word != "--detach"]
    with LOG.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lab.libvirt", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while process.poll() is None:
        there = state.find()
        if there is not None and there.hosts:
            print(LOG.read_text(), end="")
            return 0
        time.sleep(POLL_SECONDS)
    print(LOG.read_text(), end="", file=sys.stderr)
    return process.returncode


def down(options: argparse.Namespace) -> int:
    """End the lab."""
    there = state.find()
    if there is None:
        print("no lab is up")
        return 0
    there.end()
    return 0


def status(options: argparse.Namespace) -> int:
    """Hosts and their guests; 1 when no lab is up."""
    there = state.find()
    if there is None:
        print("no lab is up")
        return 1
    for host in there.hosts:
        print(f"host {host}", flush=True)
        subprocess.run(there.enter(host, ["virsh", "list", "--all"]), check=False)
    return 0


def shell(options: argparse.Namespace) -> int:
    """Become a shell in a host."""
    there = state.find()
    if there is None:
        raise LabError("no lab is up; bring one up with: python -m lab.libvirt up")
    words = there.enter(options.host, options.command or ["bash"])
    os.execvp(words[0], words)


if __name__ == "__main__":
    sys.exit(main())
