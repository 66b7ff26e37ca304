"""Mappings of a NAT or firewall that is controlled by PCP (RFC 6887) as a SAMI driver."""

from sami_plugin.drivers.pcp.driver import PcpDriver

__all__ = ["PcpDriver"]
