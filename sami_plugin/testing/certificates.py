"""Certificates for hosts that exist for a test only."""

from __future__ import annotations

from pathlib import Path

from sami_plugin.channel.authority import Authority, write_file
from sami_plugin.model.settings import Files


class Certificates:
    """An authority of its own in a folder, and what it gives to hosts."""

    def __init__(self, folder: Path) -> None:
        """Goes on with the authority that is in the folder, or makes one."""
        self.folder = folder
        is_there = (folder / "ca.key").exists()
        self.authority = Authority(folder) if is_there else Authority.create(folder, "authority of a test")

    def files(self, host: str, days: int = 2) -> Files:
        """A new certificate of the host, in place of the one before."""
        certificate, key = self.authority.issue(host, days)
        files = Files(
            self.folder / f"{host}.pem", self.folder / f"{host}.key", self.folder / "ca.pem", self.folder / "crl.pem"
        )
        write_file(files.key, key, mode=0o600)
        write_file(files.certificate, certificate)
        return files
