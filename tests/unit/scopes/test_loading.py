"""Finders are made by name of what the configuration says."""

from __future__ import annotations

from pathlib import Path

import pytest
from oslo_config import cfg

from sami_plugin import conf as options
from sami_plugin.errors import ConfigurationError
from sami_plugin.scopes.loader import load_scopes


def configured(tmp_path: Path, text: str) -> cfg.ConfigOpts:
    file = tmp_path / "sami.conf"
    file.write_text(text)
    conf = cfg.ConfigOpts()
    options.register(conf)
    conf(args=[], default_config_files=[str(file)], default_config_dirs=[])
    return conf


def test_static_takes_the_file_that_the_configuration_names(tmp_path: Path) -> None:
    ports = tmp_path / "ports.json"
    ports.write_text('{"ports": [{"port": "p", "guest": "g", "zone": 7, "addresses": []}]}')
    finder = load_scopes("static", configured(tmp_path, f"[agent]\nscope_file = {ports}\n"))
    assert [scope.port for scope in finder.find("g")] == ["p"]


def test_unknown_finder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'nobody'"):
        load_scopes("nobody", configured(tmp_path, ""))
