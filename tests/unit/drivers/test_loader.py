"""Drivers by name."""

from __future__ import annotations

import pathlib
import sys

import pytest

from sami_plugin import errors
from sami_plugin.drivers import loader
from sami_plugin.drivers.linux_conntrack import LinuxConntrackDriver


@pytest.fixture
def installed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with entry points, as pip would leave it."""
    info = tmp_path / "sami_test_drivers-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sami-test-drivers\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[sami.drivers]\n"
        "test_conntrack = sami_plugin.drivers.linux_conntrack:LinuxConntrackDriver\n"
        "test_broken = sami_plugin.drivers.none_such:Driver\n"
        "test_no_driver = sami_plugin.errors:SamiError\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    # stevedore keeps what it found, in the process and on disk.
    monkeypatch.setattr(loader.stevedore_driver.DriverManager, "ENTRY_POINT_CACHE", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(tmp_path) in sys.path


@pytest.mark.usefixtures("installed")
def test_driver_is_loaded_by_name_with_its_options() -> None:
    driver = loader.load_driver("test_conntrack", receive_octets=1 << 16)
    assert isinstance(driver, LinuxConntrackDriver)


@pytest.mark.usefixtures("installed")
def test_unknown_driver_is_an_operators_error_that_lists_the_known_ones() -> None:
    with pytest.raises(errors.ConfigurationError, match=r"none_such.*test_broken, test_conntrack, test_no_driver"):
        loader.load_driver("none_such")


@pytest.mark.usefixtures("installed")
def test_driver_that_cannot_be_imported_says_why() -> None:
    with pytest.raises(errors.NotAvailable, match=r"test_broken.*none_such"):
        loader.load_driver("test_broken")


@pytest.mark.usefixtures("installed")
def test_entry_point_that_is_no_driver_is_refused() -> None:
    with pytest.raises(errors.NotAvailable, match="no FlowDriver"):
        loader.load_driver("test_no_driver")


@pytest.mark.usefixtures("installed")
def test_unknown_option_is_a_configuration_error() -> None:
    with pytest.raises(errors.ConfigurationError, match="does not take these options"):
        loader.load_driver("test_conntrack", colour="green")
