"""Run a command as root under another kernel of Debian's, in QEMU without KVM, on this machine's own root.

The tree, its environment and all tools are where they are here, and the command runs in the current folder. What it
writes is lost, but for what it writes to $OUTPUT. KERNEL_LAB is set to the suite. The exit code is the command's; 124:
time over; 125: there is no kernel, or the guest died.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from lab.broker import Broker
from lab.command import EXIT_INTERRUPTED
from lab.errors import DeadlinePassed, LabError
from lab.isolation import EXIT_UNAVAILABLE
from lab.kernels import guest, parts

EXIT_TIME_OVER = 124


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lab.kernels", description=__doc__)
    parser.add_argument("-t", "--seconds", type=float, default=600.0, help="how long the guest may run: 600")
    parser.add_argument("--suite", choices=parts.SUITES, default=parts.SUITES[0], help=f"whose: {parts.SUITES[0]}")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="is $OUTPUT there")
    parser.add_argument("--broker", action="store_true", help="start a RabbitMQ here, which the guest can reach")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --")
    options = parser.parse_args()
    try:
        kernel = parts.fetch(options.suite)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kernel-lab-")))
            output = options.output or folder / "output"
            output.mkdir(parents=True, exist_ok=True)
            # In the guest it was not up after two minutes.
            port = stack.enter_context(Broker(folder)).port if options.broker else None
            return guest.run(kernel, options.command, output, options.seconds, port)
    except DeadlinePassed as error:
        print(f"time over: {error}", file=sys.stderr)
        return EXIT_TIME_OVER
    except LabError as error:
        print(error, file=sys.stderr)
        return EXIT_UNAVAILABLE
    except KeyboardInterrupt:
        print("interrupted; the guest is ended", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
