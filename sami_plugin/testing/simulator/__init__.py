"""A simulator: hosts in memory with the shipped agents, sessions, decisions, codec and reference driver.

One seed makes one run, always the same: who migrates where, what the network, the firewalls and the hypervisors do, and
when. What is promised is looked at while it goes on and when it is over. From the command line:

    python -m sami_plugin.testing.simulator --help
"""

from __future__ import annotations

from sami_plugin.testing.simulator.world import Violation, World

__all__ = ["Violation", "World"]
