"""The Linux kernel's conntrack table: ctnetlink in columns, no Python statement per flow."""

from sami_plugin.drivers.linux_conntrack.driver import LinuxConntrackDriver
from sami_plugin.drivers.linux_conntrack.watch import keep_events_on

__all__ = ["LinuxConntrackDriver", "keep_events_on"]
