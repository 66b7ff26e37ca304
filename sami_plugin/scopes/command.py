"""Runs a tool that tells what this host's kernel knows."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from sami_plugin.errors import NotAvailable, NotPermitted

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
SECONDS = 5.0
_FORBIDDEN = ("permission denied", "not permitted", "must be root")


def output_of(argv: Sequence[str], package: str, needs: str = "CAP_NET_ADMIN") -> tuple[str, str]:
    """What the tool writes, and in one line what it remarks beside that.

    It runs in the network namespace of the calling thread. Blocks until it ends.

    :raises NotAvailable: it is not installed (`package` has it), fails, or does not end in time.
    :raises NotPermitted: it may not be told; `needs` is what the agent lacks.
    """
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', os.defpath)}:{SBIN}", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            list(argv), stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise NotAvailable(f"{argv[0]} is not there; install the package {package}") from error
    except subprocess.TimeoutExpired as error:
        raise NotAvailable(f"{' '.join(argv)} has not ended within {SECONDS:g} s; look what keeps it") from error
    except OSError as error:
        raise NotAvailable(f"{argv[0]} cannot be run: {error.strerror}") from error
    said = " ".join(done.stderr.decode(errors="replace").split())[:400]
    if done.returncode != 0:
        said = said or f"exit code {done.returncode}"
        if any(word in said.lower() for word in _FORBIDDEN):
            raise NotPermitted(f"{' '.join(argv)}: {said}; the agent needs {needs}")
        raise NotAvailable(f"{' '.join(argv)}: {said}")
    return done.stdout.decode(errors="replace"), said
