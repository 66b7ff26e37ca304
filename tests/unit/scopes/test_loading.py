"""Finders are made by name of what the configuration says."""

from __future__ import annotations

from pathlib import Path

import pytest
from oslo_config import cfg

from sami_plugin import conf as options
from sami_plugin.errors import ConfigurationError, NotAvailable
from sami_plugin.scopes.loader import load_scopes
from tests.unit.installed import install_broken


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


def test_finder_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_broken(tmp_path, monkeypatch, "sami.scopes")
    with pytest.raises(NotAvailable, match=r"scopes: the scope finder 'broken' cannot be loaded: .*none_such"):
        load_scopes("broken", configured(tmp_path, ""))
