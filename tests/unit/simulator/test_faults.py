"""The simulator can fail: it finds each of the mistakes in `faults` soon."""

from __future__ import annotations

import pytest

from sami_plugin.testing.simulator import World
from sami_plugin.testing.simulator.__main__ import main
from tests.unit.simulator.faults import FAULTS, Fault, payloads_are_not_kept


def first_found(fault: Fault) -> int | None:
    with fault.put_in():
        for seed in range(fault.within):
            if World(seed, tells=False, **fault.mix).run():
                return seed
    return None


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_found(fault: Fault) -> None:
    seed = first_found(fault)
    assert seed is not None, f"not found in {fault.within} runs"
    assert World(seed, **fault.mix).run() == [], "the run breaks a promise without the fault, too"


def test_there_are_as_many_faults_as_were_promised() -> None:
    assert len(FAULTS) >= 20


def test_command_line_names_the_seed_that_failed_and_tells_its_story(capsys: pytest.CaptureFixture[str]) -> None:
    with payloads_are_not_kept():
        assert main(["--runs", "20"]) == 1
        said = capsys.readouterr().out
        line = next(line for line in said.splitlines() if line.startswith("seed "))
        seed = line.rpartition(" ")[2]
        assert main(["--seed", seed]) == 1
    told = capsys.readouterr().out
    assert "VIOLATED: what is done was recorded before" in told
