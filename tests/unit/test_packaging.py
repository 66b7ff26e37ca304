"""What ships is tested as shipped: the wheel, its entry points, the requirement files, the sample configuration."""

import configparser
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = ("sami_plugin", "tempest_tests")

LOAD_ALL = """
import importlib.metadata, importlib.util, pathlib, sys
here = pathlib.Path(sys.argv[1])
(distribution,) = importlib.metadata.distributions(path=[str(here)])
for entry_point in distribution.entry_points:
    if entry_point.group == "tempest.test_plugins" and importlib.util.find_spec("tempest") is None:
        continue  # there is nobody to load it
    name = f"{entry_point.group}: {entry_point.name} = {entry_point.value}"
    try:
        entry_point.load()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
        continue
    source = pathlib.Path(sys.modules[entry_point.module].__file__)
    if not source.is_relative_to(here):
        print(f"{name}: loaded from {source}, which is not the wheel")
"""


def run(*command, cwd, **options):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, **options)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone of this tree would hold: two commits, no tag."""
    tree = tmp_path_factory.mktemp("clone")
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "requirements.txt", "README.rst", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    # Not shipped, and here to see that it is not.
    for name in (*SHIPPED, "lab", "tests", "tools", "benchmarks", "doc"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "build"))
    run("git", "init", "--quiet", cwd=tree)
    run("git", "add", "--all", cwd=tree)
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    for message in ("everything", "nothing"):
        run("git", *author, "commit", "--quiet", "--no-verify", "--allow-empty", "--message", message, cwd=tree)
    return tree


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    """The wheel, built from the clone without network."""
    target = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), ".", cwd=clone)
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def requirements(path):
    """The requirements of one file, without those of the files that it includes."""
    lines = (line.split("#")[0].strip() for line in (ROOT / path).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def extras():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return [Requirement(line) for name in setup["extras"] for line in setup["extras"][name].split("\n") if line]


def test_wheel_carries_the_two_packages_and_no_other_top_level_name(unpacked):
    metadata = [path.name for path in unpacked.glob("*.dist-info")]
    assert len(metadata) == 1
    assert sorted(path.name for path in unpacked.iterdir()) == sorted([*SHIPPED, *metadata])


@pytest.mark.parametrize("package", SHIPPED)
def test_wheel_carries_every_module_of_the_tree(package, clone, unpacked):
    in_tree = {path.relative_to(clone) for path in (clone / package).rglob("*.py")}
    in_wheel = {path.relative_to(unpacked) for path in (unpacked / package).rglob("*.py")}
    assert in_wheel == in_tree


def test_every_entry_point_of_the_wheel_loads_from_the_wheel(unpacked, tmp_path):
    command = (sys.executable, "-P", "-c", LOAD_ALL, str(unpacked))
    outcome = run(*command, cwd=tmp_path, env={"PYTHONPATH": str(unpacked), "PATH": "/usr/bin:/bin"})
    assert outcome.stdout == ""


def test_clone_without_tags_gets_a_development_version(wheel):
    assert re.match(r"sami_plugin-0\.0\.1\.dev\d+-py3-none-any\.whl$", wheel.name)


def test_wheel_names_the_licence_and_the_oldest_python(unpacked):
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    assert "\nRequires-Python: >=3.11\n" in metadata.read_text()
    assert "\nLicense: Apache-2.0\n" in metadata.read_text()
    assert list(metadata.parent.rglob("LICENSE"))


def test_lower_constraints_are_the_lower_bounds_of_what_we_require():
    bounds = {}
    for requirement in (*requirements("requirements.txt"), *extras()):
        (bound,) = (specifier for specifier in requirement.specifier if specifier.operator == ">=")
        bounds[canonicalize_name(requirement.name)] = bound.version
    pinned = {canonicalize_name(pin.name): str(pin.specifier) for pin in requirements("lower-constraints.txt")}
    assert {name: pinned.get(name) for name in bounds} == {name: f"=={version}" for name, version in bounds.items()}


@pytest.mark.parametrize("path", ["requirements.txt", "test-requirements.txt", "doc/requirements.txt"])
def test_constraints_pin_every_requirement_within_its_bounds(path):
    pins = {canonicalize_name(pin.name): next(iter(pin.specifier)) for pin in requirements("constraints.txt")}
    for requirement in (*requirements(path), *extras()):
        pin = pins[canonicalize_name(requirement.name)]
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} is pinned to {pin.version}"


def test_sample_configuration_is_what_the_options_generate(tmp_path):
    generator = (sys.executable, "-m", "oslo_config.generator")
    generated = tmp_path / "sample"
    source = "etc/oslo-config-generator/sami-agent.conf"
    run(*generator, "--config-file", source, "--output-file", str(generated), cwd=ROOT)
    shipped = ROOT / "etc/sami/sami-agent.conf.sample"
    remedy = f"generate it again: oslo-config-generator --config-file {source}"
    assert shipped.read_text() == generated.read_text(), remedy
