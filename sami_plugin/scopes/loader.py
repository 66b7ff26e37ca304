"""Scope finders by name, from the entry points of the namespace ``sami.scopes``."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from oslo_config import cfg
from stevedore import driver as stevedore_driver
from stevedore.exception import NoMatches

from sami_plugin.errors import ConfigurationError, NotAvailable
from sami_plugin.scopes.base import ScopeFinder


def load_scopes(name: str, conf: cfg.ConfigOpts) -> ScopeFinder:
    """The scope finder of this name, made with its options.

    :raises ConfigurationError: there is no such scope finder, or its options are wrong.
    :raises NotAvailable: it is installed and cannot be loaded.
    """
    try:
        found: stevedore_driver.DriverManager[Any] = stevedore_driver.DriverManager(
            "sami.scopes", name, on_load_failure_callback=_failed
        )
    except NoMatches as error:
        raise ConfigurationError(f"[agent] scopes: there is no scope finder {name!r}") from error
    finder: Any = found.driver
    if not (isinstance(finder, type) and issubclass(finder, ScopeFinder)):
        raise ConfigurationError(f"[agent] scopes: {name!r} is no scope finder but {finder!r}")
    return finder.from_conf(conf)


def _failed(manager: object, entry_point: metadata.EntryPoint, error: BaseException) -> None:
    raise NotAvailable(f"[agent] scopes: the scope finder {entry_point.name!r} cannot be loaded: {error}") from error
