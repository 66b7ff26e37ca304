#!/bin/sh
# This is sami-libvirt-hook of sami_plugin, put here by `sami hook install`.
""":"
# sh reads up to "exit 0", Python takes the same lines for a docstring. libvirt lets a guest start or move only if its
# hook ends with 0, so a Python that is missing or broken here may not be what stops it. 3 is a veto, and nothing else.
case "${2-help}" in
migrate | started | stopped | help) ;;
*) exit 0 ;;
esac
/usr/bin/python3 -IS "$0" "$@"
code=$?
[ $code -ne 3 ] || exit 3
[ $code -eq 0 ] || logger -t sami-libvirt-hook "/usr/bin/python3 ended with $code, sami-agent was told nothing" 2>&-
exit 0
"""

# libvirt's hook: tells sami-agent on this host that a guest comes, has been started, or is gone.
#
# One file without anything of ours beside it, Python 3.9 or newer. libvirt runs it each time a guest starts or ends, so
# it imports what is compiled into Python and little else: socket, signal and json alone would double its cost.
# It writes nothing on stdout, where libvirt would take it for the guest's new XML.

import posix
import sys
from time import monotonic, sleep

try:  # the parts in C, which need no other module
    import _signal as signal  # type: ignore[import-not-found]
    import _socket as socket
except ImportError:
    import signal
    import socket  # type: ignore[no-redef]

SETTINGS = "/etc/sami/libvirt-hook.conf"
SETTINGS_VARIABLE = b"SAMI_LIBVIRT_HOOK_CONF"
"""Names another file, for tests: libvirt passes no such variable on."""
MOST_SECONDS = 600.0
MARGIN_SECONDS = 0.5
"""What the agent gets beyond its own limit, so that it is the one that says why there is no verdict yet."""
MOST_OCTETS = 1 << 20
"""Of a line to the agent, and of the XML that is read."""
VETO = 3

TOLD = {
    # operation: its sub-operation, the agent's word, what bounds the wait, this host's role if that is known
    "migrate": ("begin", "prepare", "verdict_seconds", "destination"),
    "started": ("begin", "started", "started_seconds", "destination"),
    # also on the source, and at the end of a guest that never moved
    "stopped": ("end", "stopped", "started_seconds", None),
}

USAGE = f"""\
This is libvirt's hook of sami_plugin: libvirt runs it as

    50-sami GUEST OPERATION SUB-OPERATION EXTRA < DOMAIN.xml

and it tells sami-agent of `migrate begin`, `started begin` and `stopped end`. `sami hook status` says whether it works
here; its settings are in {SETTINGS}: socket, verdict_seconds, started_seconds, veto, log.
"""


class Settings:
    """What applies where the file says nothing else."""

    def __init__(self) -> None:
        self.socket = "/run/sami/agent.sock"
        self.verdict_seconds = 5.0
        self.started_seconds = 2.0
        self.veto = False
        self.log = "/dev/log"


def read_settings(path: str) -> "tuple[Settings, list[str]]":
    """What the file says, which need not be there, and a complaint for each line that says nothing."""
    settings = Settings()
    complaints: list[str] = []
    try:
        text = _beginning_of(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return settings, complaints
    except OSError as error:
        return settings, [f"{path}: {error.strerror}; the defaults apply"]
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        key, _, value = (part.strip() for part in line.partition("="))
        try:
            if key not in _READERS:
                raise ValueError(f"there is no setting {key:.40}")
            setattr(settings, key, _READERS[key](value))
        except ValueError as error:
            complaints.append(f"{path}, line {number} is ignored: {error}")
    return settings, complaints


def _beginning_of(path):
    file = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        return posix.read(file, 1 << 16)
    finally:
        posix.close(file)


def _path(text):
    if not text.startswith("/") or len(text.encode()) > 107:
        raise ValueError("it has to be an absolute path of at most 107 octets")
    return text


def _seconds(text):
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MOST_SECONDS:
        raise ValueError(f"it has to be seconds, more than 0 and at most {MOST_SECONDS:g}")
    return seconds


def _is_yes(text):
    if text not in ("yes", "no"):
        raise ValueError("it has to be yes or no")
    return text == "yes"


_READERS = {
    "socket": _path,
    "verdict_seconds": _seconds,
    "started_seconds": _seconds,
    "veto": _is_yes,
    "log": _path,
}


def main(arguments: "list[str]") -> int:
    """The exit code of one call by libvirt: 0, or `VETO`."""
    if len(arguments) < 3:
        _say(USAGE)
        return 0
    guest, operation, sub_operation = arguments[:3]
    if operation not in TOLD or TOLD[operation][0] != sub_operation:
        return 0
    begin = monotonic()
    log = _Log(f"{guest} {operation}: ")
    try:
        # Everything below has a deadline. What does not keep it, whatever that may be, ends here.
        signal.signal(signal.SIGALRM, lambda *_: log.out_of_time())
        signal.setitimer(signal.ITIMER_REAL, 5.0)
        settings, complaints = read_settings(posix.environ.get(SETTINGS_VARIABLE, b"").decode() or SETTINGS)
        log.path = settings.log
        log.complaints += complaints
        _, phase, limit, role = TOLD[operation]
        deadline = begin + getattr(settings, limit) + MARGIN_SECONDS
        signal.setitimer(signal.ITIMER_REAL, deadline + MARGIN_SECONDS - monotonic())
        answer, reason = _tell(phase, role, settings.socket, deadline, log)
        if answer == "veto":
            # Only a migration can be refused: a guest that is started here may be one that never moved.
            if settings.veto and operation == "migrate":
                log.complaints.append(f"refused by sami-agent: {reason}")
                _say(f"sami-agent refuses the migration: {reason}\n")
                return VETO
            log.complaints.append(f"goes on against sami-agent's veto: {reason}")
        elif answer != "ok":
            log.complaints.append(f"sami-agent says: {reason}")
    except OSError as error:
        log.complaints.append(str(error))
    except Exception as error:  # noqa: BLE001 - no fault of ours may stop a guest
        log.complaints.append(f"a fault of sami-libvirt-hook: {type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        log.write()
    return 0


def _say(text):
    try:
        posix.write(2, text.encode("utf-8", "replace"))
    except OSError:
        pass  # nobody listens


def _tell(phase, role, path, deadline, log):
    """What the agent answers, and why."""
    domain, is_whole = _domain()
    guest = _uuid(domain)
    if guest is None:
        raise OSError("libvirt gave no XML with a <uuid>; sami-agent was told nothing")
    said = f'{{"guest": "{guest}", "phase": "{phase}"'
    if role is not None:
        said += f', "role": "{role}"'
    line = said.encode()
    if phase != "stopped":
        text = domain.decode("utf-8", "replace").translate(_ESCAPES)
        carried = f', "domain": "{text}"'.encode()
        if is_whole and len(line) + len(carried) + 2 <= MOST_OCTETS:
            line += carried
        else:
            log.complaints.append(f"the XML is longer than {MOST_OCTETS} octets, and was left out")
    try:
        answer = _ask(path.encode(), line + b"}\n", deadline)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}; is sami-agent running?") from error
    if answer == b'{"answer": "ok"}\n':
        return "ok", ""
    import json

    try:
        said = json.loads(answer)
        return said["answer"], " ".join(str(said.get("reason")).split())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{path}: no answer that is one: {answer[:60]!r}") from error


_ESCAPES = {34: '\\"', 92: "\\\\"}
_ESCAPES.update((number, f"\\u{number:04x}") for number in range(32))


def _domain():
    """What stands on stdin, and whether that is all of it. libvirt does not mind what nobody reads."""
    parts: list[bytes] = []
    octets = 0
    try:
        while octets <= MOST_OCTETS:
            part = posix.read(0, 1 << 16)
            if not part:
                return b"".join(parts), True
            parts.append(part)
            octets += len(part)
    except OSError as error:
        raise OSError(f"stdin cannot be read: {error.strerror}") from error
    return b"".join(parts), False


def _uuid(domain):
    """The guest's: libvirt writes it right after the name, before anything that others put in, and text is escaped."""
    begin = domain.find(b"<uuid>") + 6
    end = domain.find(b"</uuid>", begin, begin + 60)
    if begin < 6 or end < 0:
        return None
    text = domain[begin:end].strip().decode("latin-1")
    is_uuid = len(text) == 36 and all(
        digit == "-" if place in (8, 13, 18, 23) else digit in "0123456789abcdefABCDEF"
        for place, digit in enumerate(text)
    )
    return text if is_uuid else None


def _ask(path, line, deadline):
    """The agent's line of answer."""

    def time_left():
        left = deadline - monotonic()
        if left <= 0:
            raise OSError("no answer in time")
        return left

    agent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        while True:
            agent.settimeout(time_left())
            try:
                agent.connect(path)
                break
            except BlockingIOError:  # many hooks at a time, and the agent's queue is full
                sleep(min(0.01, time_left()))
        try:
            agent.sendall(line)
        except BrokenPipeError:
            pass  # it may have said why
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < 1 << 16:
            agent.settimeout(time_left())
            part = agent.recv(1 << 12)
            if not part:
                break
            answer += part
        return answer
    finally:
        agent.close()


class _Log:
    """What is wrong, as one line to syslog when all is over."""

    def __init__(self, prefix):
        self.path = Settings().log
        self.prefix = prefix
        self.complaints: list[str] = []

    def write(self):
        if not self.complaints:
            return
        text = "".join(one if one.isprintable() else " " for one in self.prefix + "; ".join(self.complaints))
        octets = b"<28>sami-libvirt-hook[%d]: " % posix.getpid() + text.encode("utf-8", "replace")[:900]
        try:
            syslog = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            syslog.setblocking(False)
            syslog.sendto(octets, self.path.encode())
            syslog.close()
        except OSError:
            pass  # there is nobody to tell

    def out_of_time(self):
        self.complaints.append("out of time, whatever it waits for; sami-agent may not know")
        self.write()
        posix._exit(0)


if __name__ == "__main__":
    code = 0
    try:
        code = main(sys.argv[1:])
    finally:
        # Ends at once, and without a word about anything that is still open.
        posix._exit(code)
