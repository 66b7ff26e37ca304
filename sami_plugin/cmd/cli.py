"""sami: looks at this host, at its flows, and at what its agent did."""

from __future__ import annotations

import os
import sys
import warnings

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 and the signal's number."""
NOBODY_READS = 141


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. 0: done; 1: an error, told in one line on stderr; 2: wrong usage; 130: interrupted."""
    # oslo.messaging imports eventlet through oslo.service, whether anybody uses it or not.
    warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")
    try:
        from sami_plugin.cli.application import Application

        code = Application().run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    return code


if __name__ == "__main__":
    sys.exit(main())
