"""Commands that are killed and started again end with the files of an unkilled run (more: benchmarks/faults.py)."""

from pathlib import Path
from random import Random

import pytest

import case
import kills
from case import Workshop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return case.build(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize("command", kills.COMMANDS)
def test_a_killed_command_ends_with_the_files_of_an_unkilled_one(shop: Workshop, tmp_path: Path, command: str) -> None:
    cost = kills.straight(shop, command, tmp_path / "straight")
    assert cost[1] > 2, "it touches the file system"
    trials = [kills.trial(shop, command, tmp_path / "straight", cost, tmp_path / str(i), Random(i)) for i in range(2)]
    assert not any(trial.wrong for trial in trials), trials
    assert sum(trial.met for trial in trials) > 0, "no kill met the command"
