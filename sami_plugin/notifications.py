"""What other programs are told of a migration: notifications, sent as OpenStack's services send theirs.

`started`, `at_risk` and `ended` make them; doc/source/reference/notifications.rst tells every field and has samples.
They travel in clear to whoever listens: no address of a guest or of its peers is in them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import oslo_messaging
from oslo_config import cfg

from sami_plugin.errors import ConfigurationError
from sami_plugin.model.migration import Outcome
from sami_plugin.model.printable import printable
from sami_plugin.model.report import Report
from sami_plugin.model.risk import Risk
from sami_plugin.model.settings import Limits
from sami_plugin.model.verdict import Verdict

LOG = logging.getLogger(__name__)

VERSION = "1.1"
"""Of the payloads. The minor number grows with a field that is added, the major one with anything else."""
START, RISK, END, ERROR = (f"sami.migration.{kind}" for kind in ("start", "risk", "end", "error"))
PRIORITIES = {START: "info", RISK: "warn", END: "info", ERROR: "error"}

MOST_CHARACTERS = 256
"""Of a text: a peer may have a word in it."""
MOST_REASONS = 20
OTHER_REASONS = "other reasons"
MOST_WAITING = 1000
"""Notifications that wait for the broker."""
STOP_SECONDS = 1.0
FOREVER = sys.maxsize
"""Tries."""
DRIVERS = "oslo.messaging.notify.drivers"


@dataclass(frozen=True, slots=True)
class Notification:
    """One, as it will be sent."""

    event_type: str
    payload: dict[str, Any]

    @property
    def priority(self) -> str:
        """A method of the Notifier; a listener's endpoint has one of the same name."""
        return PRIORITIES[self.event_type]


def started(report: Report, at: float, state: str, *, is_held: bool) -> Notification:
    """A session begins, in this state. `is_held`: the migration waits for this host's policy."""
    return Notification(START, {**_common(report, at), "state": state, "is_held": is_held})


def at_risk(report: Report, at: float, risk: Risk, limits: Limits) -> Notification:
    """Something would be lost, or it is not known what, or the policy does not let the guest come just so.

    The report has the verdict.
    """
    is_asked = report.verdict["verdict"] == Verdict.ASK.value
    answer = f"sami session {{}} {report.session}" if is_asked else None
    return Notification(
        RISK,
        {
            **_common(report, at),
            **_verdict(report),
            "flows": risk.flows,
            "carried": risk.carried,
            "losses": _counted(risk.losses),
            "degraded": _counted(risk.degraded),
            "why_unknown": _text(risk.why_unknown) or None,
            "answer_until": at + limits.ask_seconds if is_asked else None,
            "approve_with": answer and answer.format("approve"),
            "refuse_with": answer and answer.format("refuse"),
            "silence_means": limits.silence_means.value if is_asked else None,
        },
    )


def ended(report: Report, at: float) -> Notification:
    """A session is over. Where nobody has to look after it, this is END, else ERROR; the fields are the same."""
    is_well = report.outcome in [one.value for one in (Outcome.MOVED, Outcome.STAYED, Outcome.CONTINUED)]
    return Notification(
        END if is_well else ERROR,
        {
            **_common(report, at),
            **_verdict(report),
            "outcome": report.outcome or Outcome.FAILED.value,
            "reason": _text(report.reason),
            "counts": dict(report.flows),
            "named": _counted({reason: entry["count"] for reason, entry in report.named.items()}),
            "milliseconds": report.spans(),
        },
    )


def _common(report: Report, at: float) -> dict[str, Any]:
    return {
        "version": VERSION,
        "at": at,
        "session": report.session,
        "guest": report.guest,
        "role": report.role,
        "host": report.host,
        "peer": _text(report.peer),
        "request_id": _text(report.request_id) or None,
    }


def _verdict(report: Report) -> dict[str, Any]:
    said = report.verdict
    return {name: _text(said[name]) if name in said else None for name in ("verdict", "policy")}


def _text(words: str) -> str:
    return printable(words, MOST_CHARACTERS)


def _counted(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first, and no more reasons than may be."""
    kept: Counter[str] = Counter()
    for number, (reason, count) in enumerate(Counter(counts).most_common()):
        kept[_text(reason) if number < MOST_REASONS else OTHER_REASONS] += count
    return dict(kept)


class Notifications:
    """Where they go: nowhere."""

    def tell(self, made: Callable[..., Notification], *of: Any, **named: Any) -> None:
        """Sends what is `made` of that; for nobody, nothing is. From any thread; returns at once, and never raises."""

    def stop(self) -> None:
        """Nothing is sent any more. Blocks up to `STOP_SECONDS` for what still waits. May be repeated."""


class Queued(Notifications):
    """To the broker, in their order, by a thread of its own that begins with the first of them."""

    def __init__(
        self, host: str, hand_over: Callable[[Notification], object], close: Callable[[], object] = lambda: None
    ) -> None:
        """`hand_over` may block for as long as it likes, and `close` what it uses."""
        self._host = host
        self._hand_over = hand_over
        self._close = close
        self._waiting: deque[Notification] = deque()
        self._changed = threading.Condition()
        self._dropped = 0
        self._has_stopped = False
        self._thread: threading.Thread | None = None

    def tell(self, made: Callable[..., Notification], *of: Any, **named: Any) -> None:
        """One that is too many is dropped."""
        notification = made(*of, **named)
        with self._changed:
            if self._has_stopped:
                return
            if len(self._waiting) >= MOST_WAITING:
                self._dropped += 1
                if self._dropped == 1:
                    LOG.warning(
                        "%s: %d notifications wait for the broker; those that follow are dropped and counted",
                        self._host,
                        MOST_WAITING,
                    )
                return
            self._waiting.append(notification)
            if self._thread is None:
                self._thread = self._begun()
            self._changed.notify()

    def _begun(self) -> threading.Thread | None:
        # A daemon: oslo.messaging may wait for its broker for ever, and the agent ends all the same.
        thread = threading.Thread(target=self._live, name="sami-notifications", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the host has no more threads; the next one to be sent tries again
            LOG.error("%s: notifications have to wait: %s", self._host, error)
            return None
        return thread

    def stop(self) -> None:
        with self._changed:
            self._has_stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
        with self._changed:
            self._tell_dropped()
            if self._waiting:
                LOG.warning("%s: %d notifications could not be sent before the end", self._host, len(self._waiting))
                self._waiting.clear()

    def _live(self) -> None:
        while (notification := self._next()) is not None:
            try:
                self._hand_over(notification)
            except Exception:  # of the messaging library: the next one may be sent
                LOG.exception("%s: %s could not be sent", self._host, notification.event_type)
            with self._changed:
                if self._waiting:  # `stop` may have given it up
                    self._waiting.popleft()
                if not self._waiting:
                    self._tell_dropped()
        self._close()

    def _next(self) -> Notification | None:
        """Waits for one; it waits with the others until it is sent. None: there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._has_stopped)
            return self._waiting[0] if self._waiting else None

    def _tell_dropped(self) -> None:
        if self._dropped:
            LOG.warning("%s: %d notifications were dropped", self._host, self._dropped)
            self._dropped = 0


def from_conf(conf: cfg.ConfigOpts, host: str) -> Notifications:
    """As the options of [oslo_messaging_notifications] say: without a driver, nowhere. Does not connect.

    :raises ConfigurationError: there is no such driver, or the broker's URL is none.
    """
    try:
        transport = oslo_messaging.get_notification_transport(conf)
    except (oslo_messaging.InvalidTransportURL, oslo_messaging.DriverLoadFailure) as error:
        raise ConfigurationError(f"[oslo_messaging_notifications] transport_url: {error}") from error
    drivers = [one for one in conf.oslo_messaging_notifications.driver if one]
    known = importlib.metadata.entry_points(group=DRIVERS).names
    for one in drivers:
        if one not in known:
            raise ConfigurationError(
                f"[oslo_messaging_notifications] driver: there is no {one!r}; there are {', '.join(sorted(known))}"
            )
    if not drivers:
        return Notifications()
    # -1 is to mean for ever. When oslo.messaging 18.3 first connects it hands that to kombu as it is, which then tries
    # once: each notification that meets no broker would be lost.
    retry = conf.oslo_messaging_notifications.retry
    notifier = oslo_messaging.Notifier(transport, publisher_id=f"sami.{host}", retry=FOREVER if retry < 0 else retry)

    def hand_over(one: Notification) -> None:
        getattr(notifier, one.priority)({}, one.event_type, one.payload)

    return Queued(host, hand_over, transport.cleanup)
