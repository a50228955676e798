"""The ramp: the number of draft steps K grows from 1 to `draft_steps` over the first share of the training."""

from pathlib import Path

import pytest

import tiny_run
from vsd.data import Example
from vsd.targets import Target
from vsd.training import VSDTrainer


@pytest.fixture(scope="module")
def examples(tiny_target: Target) -> list[Example]:
    """Answers with more drafted tokens than draft steps, so that every step of every batch is trained."""
    found = [example for example in tiny_run.tiny_examples(tiny_target, 24) if sum(example.drafted) > 5]
    assert len(found) >= 8
    return found[:8]


def steps_trained(trainer: VSDTrainer) -> list[int]:
    """K of every optimisation step: the log holds an accuracy for each draft step that was trained."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [sum(name.startswith("accuracy_") for name in entry) for entry in entries]


@pytest.mark.parametrize(
    ("ramp", "wanted"),
    [
        (0.0, [3] * 12),
        (0.5, [1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]),
        (1.0, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]),
    ],
)
def test_draft_steps_grow_evenly_over_the_ramp(
    tiny_target: Target, examples: list[Example], tmp_path: Path, ramp: float, wanted: list[int]
) -> None:
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, ramp=ramp, max_steps=12, logging_steps=1)
    trainer.train()
    assert steps_trained(trainer) == wanted


def test_with_a_time_budget_the_ramp_follows_the_clock(
    tiny_target: Target, examples: list[Example], tmp_path: Path
) -> None:
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, ramp=0.5, max_minutes=2 / 60, logging_steps=1)
    trainer.train()
    found = steps_trained(trainer)
    assert found == sorted(found)
    assert set(found) == {1, 2, 3}
