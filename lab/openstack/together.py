"""Works that take long and do not need each other."""

from __future__ import annotations

import threading
from collections.abc import Callable


def together(*works: Callable[[], None]) -> None:
    """Blocks until all are done; raises what one of them raised."""
    errors: list[Exception] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001, raised in the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
