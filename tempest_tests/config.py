"""Options of the tests, in tempest.conf."""

from __future__ import annotations

from oslo_config import cfg

GROUP = cfg.OptGroup("sami", title="Live migrations that keep connections")

OPTIONS = [
    cfg.StrOpt(
        "peer_address",
        default="",
        help="Address under which servers reach this host. By default the one that this host reaches a server from; "
        "behind a translation that is not it.",
    ),
    cfg.FloatOpt(
        "stall_seconds",
        default=5.0,
        min=0.5,
        help="A connection on which nothing gets through for longer than this after a migration is lost.",
    ),
    cfg.IntOpt("servers", default=4, min=1, help="How many servers move at a time."),
]
