import logging
from collections.abc import Iterator

import pytest

from tests.unit.cli.broker import AMQP_START, Broker
from tests.unit.cli.command_line import CommandLine


@pytest.fixture
def sami() -> CommandLine:
    """The command line of a host with an empty firewall in memory."""
    return CommandLine()


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A broker that speaks AMQP."""
    made = Broker(AMQP_START)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _no_handler_left() -> Iterator[None]:
    """What a program in this process made of logging writes to a stream that pytest closes when the test ends."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [one for one in root.handlers if one not in before]:
        root.removeHandler(handler)
    root.setLevel(level)
