"""A real PCP server: Debian's miniupnpd for nftables, started by hand in a namespace, and a client of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import netaddr

from lab.deadline import wait_until
from lab.errors import LabUnavailable
from lab.namespace import Namespace
from sami_plugin.drivers.pcp.messages import Answer, External, Internal, Server
from sami_plugin.errors import DeviceFailed

START_SECONDS = 10.0
OUTER = "128.66.0.1"
"""miniupnpd takes no address of documentation or of private use. This one was TEST-B, and no packet leaves the lab."""
CHAINS = """table inet pcp {
  chain forward {
    type filter hook forward priority filter - 5; policy accept;
    iifname != OUTSIDE accept
    ct state established,related accept
    jump mapped
    drop
  }
  chain mapped { }
  chain translated { type nat hook prerouting priority dstnat; jump prerouting; }
  chain hidden { type nat hook postrouting priority srcnat; jump postrouting; }
  chain prerouting { }
  chain postrouting { }
}
"""
CONFIGURATION = """ext_ifname={outside}
ext_ip={outer}
listening_ip={inside}
listening_ip=lo
enable_upnp=no
enable_natpmp=yes
pcp_allow_thirdparty=yes
min_lifetime=1
lease_file={folder}/leases
lease_file6={folder}/leases6
upnp_table_name=pcp
upnp_nat_table_name=pcp
upnp_forward_chain=mapped
upnp_nat_chain=prerouting
upnp_nat_postrouting_chain=postrouting
uuid=00000000-0000-0000-0000-000000000001
allow 1024-65535 {inner} 1-65535
deny 0-65535 0.0.0.0/0 0-65535
"""


class PcpServer:
    """It gives guests of `inner` places of `outer` on the device `outside`, and lets nothing else in there that is new.

    The device `inside` has to have an IPv4 address. `lease_files` are what the driver reads.
    """

    def __init__(self, namespace: Namespace, folder: Path, *, outside: str, inside: str, inner: str) -> None:
        """Raises LabUnavailable when miniupnpd is not installed."""
        if shutil.which("miniupnpd") is None:
            raise LabUnavailable("miniupnpd is not installed", "apt-get install miniupnpd-nftables")
        self._namespace, self._folder, self._outside = namespace, folder, outside
        folder.mkdir()
        words = {"outside": outside, "inside": inside, "inner": inner, "outer": OUTER, "folder": folder}
        (folder / "conf").write_text(CONFIGURATION.format(**words))
        self.lease_files = [str(folder / "leases"), str(folder / "leases6")]
        self.start()

    def start(self) -> None:
        """Blocks until it answers. What it had is given again if its lease files are there."""
        self._namespace.run(["nft", "-f", "-"], CHAINS.replace("OUTSIDE", self._outside))
        with (self._folder / "log").open("ab") as log:
            argv = ["miniupnpd", "-d", "-f", str(self._folder / "conf"), "-P", str(self._folder / "pid")]
            self._process = self._namespace.start(argv, stdout=log, stderr=log)
        wait_until(self._answers, "miniupnpd to answer", START_SECONDS)

    def stop(self) -> None:
        """With it go its rules."""
        self._process.kill()
        self._process.wait()
        self._namespace.run(["nft", "delete", "table", "inet", "pcp"])

    def forget(self) -> None:
        """Begin anew without what it had, as after a crash of a router that keeps nothing."""
        self.stop()
        for path in self.lease_files:
            Path(path).unlink(missing_ok=True)
        self.start()

    def rules(self) -> str:
        """What it has told the kernel."""
        return self._namespace.run(["nft", "list", "table", "inet", "pcp"])

    def _answers(self) -> bool:
        try:
            with self._namespace.inside():
                Server("127.0.0.1", None).announce()
        except DeviceFailed:
            return False
        return True


class Client(Server):
    """A guest that asks for itself, with one nonce."""

    def __init__(self, address: str, namespace: Namespace, nonce: bytes) -> None:
        super().__init__(address, namespace.path)
        self.nonce = nonce

    def ask(self, protocol: int, port: int, outer_port: int, seconds: int = 600) -> Answer:
        """For a place for its own port."""
        own = netaddr.IPAddress(self._own_address())
        outer = own if own.version == 6 else netaddr.IPAddress(OUTER)
        return self.map(Internal(protocol, own, port), self.nonce, External(outer, outer_port), seconds)

    def _whose(self, internal: Internal) -> bytes:
        return b""
