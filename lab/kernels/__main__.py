"""Run a command as root under another kernel of Debian's, in QEMU without KVM, on this machine's own root.

The tree, its environment and all tools are where they are here, and the command runs in the current folder. What it
writes is lost, but for what it writes to $OUTPUT. KERNEL_LAB is set to the suite. The exit code is the command's; 124:
time over; 125: there is no kernel, or the guest died.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

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
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --")
    options = parser.parse_args()
    try:
        kernel = parts.fetch(options.suite)
        with tempfile.TemporaryDirectory(prefix="kernel-lab-output-") as nobodys:
            output = options.output or Path(nobodys)
            output.mkdir(parents=True, exist_ok=True)
            return guest.run(kernel, options.command, output, options.seconds)
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
