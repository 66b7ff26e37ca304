"""sami-agent for a guest, where Open vSwitch takes longer to answer than on any host: it waits for that as the labs do.

All else is `sami-agent`: python -m lab.kernels.patient --config-file PATH
"""

from __future__ import annotations

import sys

from lab.deadline import STRETCH
from sami_plugin.cmd import agent
from sami_plugin.scopes import command, ovsdb

if __name__ == "__main__":
    command.SECONDS *= STRETCH
    ovsdb.SECONDS *= STRETCH
    ovsdb.WAIT_SECONDS *= STRETCH
    ovsdb.RESTRICT_SECONDS *= STRETCH
    sys.exit(agent.main())
