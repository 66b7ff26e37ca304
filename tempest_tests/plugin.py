"""Makes tempest know the tests of this package."""

from __future__ import annotations

import os
from typing import Any

from oslo_config import cfg
from tempest.test_discover import plugins

from tempest_tests import config


class SamiTempestPlugin(plugins.TempestPlugin):
    """The entry point."""

    def load_tests(self) -> tuple[str, str]:
        here = os.path.dirname(os.path.abspath(__file__))
        return os.path.join(here, "scenario"), os.path.dirname(here)

    def register_opts(self, conf: cfg.ConfigOpts) -> None:
        conf.register_opts(config.OPTIONS, group=config.GROUP)

    def get_opt_lists(self) -> list[tuple[str, list[Any]]]:
        return [(config.GROUP.name, config.OPTIONS)]
