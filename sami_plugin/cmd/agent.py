"""sami-agent: carries the firewall state of this host's guests along when they move."""

from __future__ import annotations

import signal
import sys

import oslo_messaging
from oslo_config import cfg
from oslo_log import log

from sami_plugin import agent
from sami_plugin import conf as options
from sami_plugin.errors import SamiError
from sami_plugin.version import release


def main(arguments: list[str] | None = None) -> int:
    """Runs until SIGTERM or SIGINT. Exits with 1 and one line on stderr if it cannot start."""
    conf = cfg.ConfigOpts()
    log.register_options(conf)
    options.register(conf)
    oslo_messaging.set_transport_defaults("sami")
    conf(sys.argv[1:] if arguments is None else arguments, project="sami", prog="sami-agent", version=release())
    log.setup(conf, "sami")
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        agent.run(conf, lambda: signal.sigwait(signals))
    except SamiError as error:
        print(f"sami-agent: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
