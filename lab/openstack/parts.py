"""What the lab takes beyond Debian's packages, made below .openstack-lab: `python -m lab.openstack.parts`.

The packages of the services (nova-compute, neutron-common, keystone, ...) are downloaded and unpacked, not installed:
of them the lab needs scripts and paste files, and no unit, user or question comes along. QEMU and the guest are
`lab.libvirt.parts`' own. `tools/prepare openstack` runs this, after it has installed the packages. GOLDEN is not made
here but by the first lab that comes up, see `lab.openstack.golden`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from lab.errors import LabUnavailable
from lab.isolation import search_path
from lab.libvirt import parts
from lab.packages import Apt, made

FOLDER = Path(__file__).parents[2] / ".openstack-lab"
SOURCES = Path(__file__).parent / "sources"
GOLDEN = FOLDER / "golden"
TREE = FOLDER / "tree"
SCRIPTS = TREE / "usr/bin"
PACKAGES = (
    "glance-api",
    "glance-common",
    "keystone",
    "neutron-common",
    "neutron-linuxbridge-agent",
    "neutron-rpc-server",
    "nova-api",
    "nova-common",
    "nova-compute",
    "nova-conductor",
    "nova-scheduler",
    "placement-api",
    "placement-common",
)
PROGRAMS = ("mariadbd", "mariadb", "mariadb-install-db", "uwsgi", "ebtables", "ipset", "qemu-img", "keystone-manage")
PYTHON = "/usr/bin/python3"
"""Debian's, whose packages the services are."""
HOW = "run as root: tools/prepare openstack"


def check() -> None:
    """Raise LabUnavailable unless everything is there that a lab takes; says what is missing and what to run."""
    try:
        parts.check()
    except LabUnavailable as error:
        raise LabUnavailable(error.missing, error.mend if "as root" not in error.mend else HOW) from error
    for program in PROGRAMS:
        if shutil.which(program, path=search_path()) is None:
            raise LabUnavailable(f"{program} is not installed", HOW)
    for package in ("nova", "neutron", "keystone", "glance", "placement", "libvirt", "pymysql"):
        # Not of this environment: of Debian's Python.
        if not any(Path("/usr/lib/python3/dist-packages").glob(f"{package}*")):
            raise LabUnavailable(f"python3-{package} is not installed", HOW)
    if not TREE.exists():
        raise LabUnavailable(f"{TREE} is not there", HOW)


def fetch() -> None:
    """Make what is missing. Blocks: some 20 s the first time. Raises LabError."""
    FOLDER.mkdir(exist_ok=True)
    if not TREE.exists():
        apt = Apt(FOLDER / "apt")
        apt.unpack(PACKAGES, TREE)
        apt.clean()


if __name__ == "__main__":
    sys.exit(made(fetch))
