"""Scope finders by name, from the entry points of the namespace ``sami.scopes``."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg
from stevedore import driver as stevedore_driver
from stevedore.exception import NoMatches

from sami_plugin.errors import ConfigurationError
from sami_plugin.scopes.base import ScopeFinder


def load_scopes(name: str, conf: cfg.ConfigOpts) -> ScopeFinder:
    """:raises ConfigurationError: there is no such scope finder, or its options are wrong."""
    try:
        found: stevedore_driver.DriverManager[Any] = stevedore_driver.DriverManager("sami.scopes", name)
    except NoMatches as error:
        raise ConfigurationError(f"[agent] scopes: there is no scope finder {name!r}") from error
    finder: Any = found.driver
    if not (isinstance(finder, type) and issubclass(finder, ScopeFinder)):
        raise ConfigurationError(f"[agent] scopes: {name!r} is no scope finder but {finder!r}")
    return finder.from_conf(conf)
