import pytest

from tests.unit.cli.command_line import CommandLine


@pytest.fixture
def sami() -> CommandLine:
    """The command line of a host with an empty firewall in memory."""
    return CommandLine()
