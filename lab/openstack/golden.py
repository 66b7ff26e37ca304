"""A filled cloud that is kept, so that the next lab needs no schemas: MariaDB's folder, images and keys in one archive.

It is of one make: of the guest, of Debian's packages and of the code that fills it. Of another make it is not used, and
is replaced by the next one.
"""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

from lab.libvirt import parts as guest_parts
from lab.openstack import addresses, content, controller, parts, settings

PACKAGES = Path("/usr/lib/python3/dist-packages")


def restore(data: Path) -> bool:
    """Put into the folder what is kept; False where nothing of our make is."""
    if not _file().exists():
        return False
    with tarfile.open(_file()) as archive:
        archive.extractall(data, filter="tar")
    return True


def keep(data: Path) -> None:
    """Keep the folder's files, which nobody may write to meanwhile, and nothing of another make."""
    parts.GOLDEN.mkdir(exist_ok=True)
    new = parts.GOLDEN / "new"
    with tarfile.open(new, "w") as archive:
        for file in sorted(data.iterdir()):
            archive.add(file, file.name)
    for old in parts.GOLDEN.glob("*.tar"):
        old.unlink()
    new.rename(_file())


def _file() -> Path:
    make = hashlib.sha256()
    for module in (addresses, content, controller):
        make.update(Path(module.__file__).read_bytes())
    make.update(repr((settings.BROKER, settings.DATA, settings.DATABASES, settings.PASSWORD, settings.URLS)).encode())
    make.update(guest_parts.INITRAMFS.read_bytes())
    make.update(guest_parts.kernel_image().name.encode())
    for service in ("glance", "keystone", "neutron", "nova", "placement"):
        make.update(str(sorted(found.name for found in PACKAGES.glob(f"{service}-*"))).encode())
    return parts.GOLDEN / f"{make.hexdigest()[:16]}.tar"
