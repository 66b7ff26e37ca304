"""Many runs of the simulator, and that a run can be told again."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from sami_plugin.testing.simulator import World
from sami_plugin.testing.simulator.__main__ import main
from sami_plugin.testing.simulator.soak import played
from sami_plugin.testing.simulator.story import Story

RUNS = 20_000
PARTS = 40


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_promise_is_kept(part: int) -> None:
    count = RUNS // PARTS
    assert played(part * count, count).failed == {}


def test_same_seed_gives_the_same_story() -> None:
    for seed in range(40):
        first, second = World(seed), World(seed)
        first.run()
        second.run()
        assert first.story.drawn() == second.story.drawn()


def test_same_seed_gives_the_same_story_in_another_process() -> None:
    command = [sys.executable, "-m", "sami_plugin.testing.simulator", "--seed", "17"]
    told = {
        subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": number}
        ).stdout
        for number in ("1", "2")
    }
    assert len(told) == 1


def test_a_run_without_a_story_goes_as_the_one_with_it() -> None:
    for seed in range(40):
        told, untold = World(seed), World(seed, tells=False)
        assert told.run() == untold.run()
        assert told.now == untold.now
        assert untold.story.lines == []


def test_story_has_a_column_for_each_host() -> None:
    story = Story(["host-a", "host-b"])
    story.tell(1.0, "host-a", "begins")
    story.tell(2.0, "host-b", "Open", "host-a")
    story.tell(3.0, "host-a", "Offer", "host-b")
    head, begins, there, back = story.drawn().splitlines()
    assert head.split() == ["host-a", "host-b"]
    assert begins.endswith("| begins")
    assert "|-- Open --" in there
    assert there.endswith(">|")
    assert "|<-- Offer --" in back
    assert back.endswith("-|")


def test_command_line_says_how_many_runs_there_were(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", "20", "--first", "100"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("20 runs in ")
    assert "million a CPU second: a run takes as long as " in said.out
    assert "20 of 20 runs" in said.err


def test_command_line_takes_another_mix(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", "20", "--mix", "guests=0", "flows=0"]) == 0
    assert main(["--seed", "3", "--mix", "guests=0", "residents=0"]) == 0
    assert "guest" not in capsys.readouterr().out


def test_command_line_tells_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == ["host-a", "host-b", "host-c"][: len(said.splitlines()[0].split())]
    assert said.endswith("Every promise was kept.\n")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--runs", "0"],
        ["--runs", "many"],
        ["--unknown"],
        ["--mix", "crashes=1"],
        ["--mix", "crash"],
        ["--mix", "crash=-1"],
        ["--mix", "crash=nan"],
    ],
)
def test_wrong_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2


HICCUPS = {"crash": 1.0, "hiccups": 0.1}
RESTLESS = {"crash": 1.0, "loss": 0.0, "abort": 0.0, "moves": 3}


@pytest.mark.parametrize(
    ("seed", "mix"),
    [
        pytest.param(530783, {}, id="what had ended was gone on with"),
        pytest.param(698790, {}, id="the next migration was taken for the one that had ended"),
        pytest.param(703821, {}, id="nobody was there for the whole of two migrations"),
        pytest.param(1066954, {}, id="the watch of a guest that was back looked for nothing, and did not say so"),
        pytest.param(46678, {}, id="what had ended was told anew, since it had been told once"),
        pytest.param(57674, {}, id="what was told of no more was named by the last of several sessions alone"),
        pytest.param(9016, {"crash": 1.0}, id="a guest that left again was asked about as one that comes"),
        pytest.param(18296, {"crash": 1.0}, id="what the guest had changed was taken for what had been put in"),
        pytest.param(24119, {"crash": 1.0}, id="what vanished was not looked at when a session was gone on with"),
        pytest.param(63220, {"crash": 1}, id="what ran out while no answer came was forgotten by a source that died"),
        pytest.param(69268, {"crash": 1}, id="a source that died while it purged forgot for what there was no place"),
        pytest.param(109630, {"crash": 1}, id="a tuple was used again before it was said that the guest runs there"),
        pytest.param(154226, {"crash": 1}, id="what was there already was refused for lack of a place, and removed"),
        pytest.param(291127, {"crash": 1}, id="a guest that had come and left again was asked about as one that comes"),
        pytest.param(316655, {"crash": 1}, id="a silent flow ran out while nobody was there to tell of it anew"),
        pytest.param(37525, HICCUPS, id="what could not be looked at was taken for put in by the next session"),
        pytest.param(503974, {**HICCUPS, "failing_device": 0.3}, id="so was what a device that failed may have taken"),
        pytest.param(532624, HICCUPS, id="what ran out while no agent was there was taken for what the guest ended"),
        pytest.param(310198, {}, id="what a late packet made at the source replaced what the guest had begun"),
        pytest.param(391135, {}, id="a journal that had failed was believed by the next session"),
        pytest.param(864652, {}, id="what has no zone was filed with another port's flows"),
        pytest.param(54214, {"crash": 1.0}, id="a late answer that was written down replaced what it answers"),
        pytest.param(50030, {"crash": 1.0}, id="what waited for its port was taken for put in"),
        pytest.param(20166965, {}, id="the call of a migration that was over came in the midst of the next one"),
        pytest.param(5000940, {"crash": 1.0, "moves": 3, "hosts": 3}, id="a stay that was over was told as an arrival"),
        pytest.param(
            5001400,
            {"crash": 1.0, "moves": 3, "is_described": 1.0},
            id="a guest that had left was taken for one that stayed",
        ),
        pytest.param(673, RESTLESS, id="the first record of what leaves had no ports"),
        pytest.param(356, RESTLESS, id="what leaves was forgotten before its session was in the journal"),
        pytest.param(4456, RESTLESS, id="who came again while no agent was there was purged"),
        pytest.param(
            50725,
            {**HICCUPS, "abort": 0.5, "moves": 3},
            id="that the guest runs was told to the session that had seen it leave, not to the one that expected it",
        ),
    ],
)
def test_seed_that_once_broke_a_promise_breaks_none(seed: int, mix: dict[str, Any]) -> None:
    assert World(seed, tells=False, **mix).run() == []
