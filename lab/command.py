"""How a command line of the lab ends."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lab.errors import LabError, LabUnavailable
from lab.isolation import EXIT_UNAVAILABLE

EXIT_INTERRUPTED = 130


def exit_code(work: Callable[[], int], failed: str) -> int:
    """What `work` returns: 125 where the lab cannot run here, 1 where it failed, 130 after Ctrl-C; stderr says why.

    `failed` are the words before the reason.
    """
    try:
        return work()
    except LabUnavailable as error:
        print(error, file=sys.stderr)
        return EXIT_UNAVAILABLE
    except LabError as error:
        print(f"{failed}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything is ended", file=sys.stderr)
        return EXIT_INTERRUPTED
