"""sami-agent: carries the firewall state of this host's guests along when they move."""

from __future__ import annotations

import signal
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oslo_config import cfg

DESCRIPTION = "Carries the firewall state of this host's guests along when they move. Ends on SIGTERM or Ctrl-C."


def main(arguments: list[str] | None = None) -> int:
    """Runs until SIGTERM or SIGINT. 1: it cannot start, told in one line on stderr; 2: wrong usage."""
    try:
        # oslo.messaging imports eventlet through oslo.service, whether anybody uses it or not.
        warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")
        return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # before the signals are ours
        return 130


def _run(arguments: list[str]) -> int:
    from oslo_config import cfg
    from oslo_log import log

    from sami_plugin import service
    from sami_plugin.cli.configuration import words
    from sami_plugin.errors import SamiError

    signals = {signal.SIGTERM, signal.SIGINT}
    # Before there are threads: they inherit the mask, and so none of them is interrupted.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        conf = _configured(arguments)
        log.setup(conf, "sami")
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        service.run(conf, lambda: signal.sigwait(signals))
    except (SamiError, cfg.Error, log.LogConfigError, OSError) as error:
        print(f"sami-agent: {words(error)}", file=sys.stderr)
        return 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return 0


def _configured(arguments: list[str]) -> cfg.ConfigOpts:
    """The options of the command line and of the configuration files.

    :raises cfg.Error: a file is not there, or is no configuration. A wrong value is told when it is read.
    :raises ConfigurationError: a file is not UTF-8.
    """
    from oslo_config import cfg
    from oslo_log import log

    from sami_plugin import conf as options
    from sami_plugin.cli.configuration import words
    from sami_plugin.errors import ConfigurationError
    from sami_plugin.version import release

    conf = cfg.ConfigOpts()
    log.register_options(conf)
    options.register(conf)
    told = _epilog()
    try:
        conf(arguments, project="sami", prog="sami-agent", version=release(), description=DESCRIPTION, epilog=told)
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"configuration: {words(error)}") from error
    return conf


def _epilog() -> str:
    from sami_plugin import conf as options

    known = "; ".join(
        f"[{group.name}] {', '.join(f'{option.name} = {option.sample_default or option.default}' for option in opts)}"
        for group, opts in options.list_opts()
    )
    return (
        "All else stands in the configuration: the files that --config-file names, or else /etc/sami/sami-agent.conf. "
        f"Its options and their defaults: {known}; the broker is transport_url in [DEFAULT]. sami-agent.conf.sample "
        "tells what each does, and `sami doctor` what this host lacks."
    )


if __name__ == "__main__":
    sys.exit(main())
