"""Drivers by name, from the entry points of the namespace ``sami.drivers``, and the kinds of state that they bring."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from stevedore import driver as stevedore_driver
from stevedore import exception as stevedore_errors

from sami_plugin import errors
from sami_plugin.drivers.base import FlowDriver
from sami_plugin.drivers.several import SeveralDrivers
from sami_plugin.model.kinds import Kinds, bring

NAMESPACE = "sami.drivers"
KINDS = "sami.kinds"

LOG = logging.getLogger(__name__)


def known_drivers() -> tuple[str, ...]:
    """The names of all installed drivers, sorted. Loads none of them."""
    return tuple(sorted({point.name for point in metadata.entry_points(group=NAMESPACE)}))


def load_driver(name: str, **options: Any) -> FlowDriver:
    """A new driver object, made with these options.

    :raises ConfigurationError: no driver of this name is installed, or it does not take these options.
    :raises NotAvailable: it is installed and cannot be loaded.
    """
    load_kinds()
    names = known_drivers()
    if name not in names:
        raise errors.ConfigurationError(
            f"there is no driver named {name!r}; installed are: {', '.join(names) or 'none'}"
        )
    try:
        manager: Any = stevedore_driver.DriverManager(
            NAMESPACE, name, invoke_on_load=False, on_load_failure_callback=_failed
        )
    except stevedore_errors.NoMatches as error:
        raise errors.NotAvailable(f"the driver {name!r} is installed but cannot be loaded: {error}") from error
    factory = manager.driver
    if not (isinstance(factory, type) and issubclass(factory, FlowDriver)):
        raise errors.NotAvailable(f"the entry point {name!r} of {NAMESPACE} is no FlowDriver but {factory!r}")
    try:
        return factory(**options)
    except TypeError as error:
        raise errors.ConfigurationError(f"the driver {name!r} does not take these options: {error}") from error


def load_drivers(options: Mapping[str, Mapping[str, Any]]) -> FlowDriver:
    """One driver of all these, made with the options of each; the first is the host's firewall.

    :raises ConfigurationError, NotAvailable: as `load_driver`.
    """
    made = [(name, load_driver(name, **own)) for name, own in options.items()]
    return made[0][1] if len(made) == 1 else SeveralDrivers(made)


@functools.cache
def load_kinds() -> None:
    """Makes known all kinds of state that the installed packages bring (`model.kinds`), whichever driver is used.

    What a broken package brings is left out, and said in the log.
    """
    for point in sorted(metadata.entry_points(group=KINDS), key=lambda point: point.name):
        try:
            brought = point.load()
            if not isinstance(brought, Kinds):
                raise errors.ConfigurationError(f"{point.value} is no Kinds but {brought!r}")
            bring(brought)
        except Exception as error:  # noqa: BLE001 - a package of others may fail in any way
            LOG.error("the kinds of state that %r brings are left out: %s", point.name, error)


def _failed(manager: object, entry_point: metadata.EntryPoint, error: BaseException) -> None:
    raise errors.NotAvailable(f"the driver {entry_point.name!r} cannot be loaded: {error}") from error
