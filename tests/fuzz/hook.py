"""What libvirt gives the hook, and what an agent answers it: ``python -m tests.fuzz.hook``.

Before the first octet 0 is the domain's XML, behind it the answer. The line that the hook says has to be an event.
"""

from __future__ import annotations

import os
import sys
import uuid
from typing import Any

from sami_plugin.cmd import libvirt_hook
from sami_plugin.errors import OperatorError
from sami_plugin.hooks import local_socket
from tests.fuzz import events
from tests.fuzz.hunt import Target, main

ANSWERS = (
    b'{"answer": "ok"}\n',
    b'{"answer": "veto", "reason": "full"}\n',
    b'{"answer": "error", "reason": "guest: has to be the guest\'s UUID"}\n',
    b"[]\n",
    b"",
)
MOST_OCTETS = 1 << 16
"""What a pipe takes before somebody reads."""


class NoGuest(Exception):
    """libvirt would not give this."""


def decode(octets: bytes) -> None:
    """Ends with an answer or with a complaint, and what was said is an event of the guest whose UUID stands there."""
    domain, _, answer = octets[:MOST_OCTETS].partition(b"\0")
    said: list[bytes] = []

    def ask(path: bytes, line: bytes, deadline: float) -> bytes:
        said.append(line)
        return answer

    real_ask, real_stdin = libvirt_hook._ask, os.dup(0)
    reading, writing = os.pipe()
    os.write(writing, domain)
    os.close(writing)
    os.dup2(reading, 0)
    os.close(reading)
    log: Any = libvirt_hook._Log("")
    libvirt_hook._ask = ask
    try:
        libvirt_hook._tell("prepare", "destination", "/nowhere", 0.0, log)
    except OSError as error:
        if not said:
            raise NoGuest from error
    finally:
        libvirt_hook._ask = real_ask
        os.dup2(real_stdin, 0)
        os.close(real_stdin)
    (line,) = said
    try:
        event = local_socket.parse(line)
    except OperatorError as error:
        raise AssertionError(f"the agent does not take what the hook says: {error}") from error
    assert event.domain == domain.decode("utf-8", "replace")
    assert str(uuid.UUID(event.guest)).encode() in domain.lower()


TARGET = Target(
    name="hook",
    corpus=tuple(events.DESCRIPTION.encode() + b"\0" + answer for answer in ANSWERS),
    decode=decode,
    refusals=(NoGuest,),
    octets=1 << 19,
    octets_per_octet=300,
)

if __name__ == "__main__":
    sys.exit(main(TARGET))
