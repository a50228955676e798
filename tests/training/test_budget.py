"""Training by the clock, with a clock that the test turns."""

import time

import pytest
from transformers import TrainerControl, TrainerState

from vsd.training import VSDConfig
from vsd.training.budget import TimeBudget


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_measuring_is_not_training(clock: list[float]) -> None:
    budget, state = TimeBudget(1), TrainerState(is_world_process_zero=False)
    config = VSDConfig(output_dir="unused")
    budget.on_train_begin(config, state, TrainerControl())
    clock[0] += 15
    with budget.paused():
        clock[0] += 1000
    budget.on_step_end(config, state, TrainerControl())
    assert budget.progress == 0.25
    with pytest.raises(ZeroDivisionError), budget.paused():
        clock[0] += 1000
        1 / 0  # noqa: B018 — an interrupted measurement is no training either
    clock[0] += 30
    budget.on_step_end(config, state, TrainerControl())
    assert (budget.progress, budget.minutes) == (0.75, 0.75)


@pytest.mark.parametrize(("eval_steps", "measured"), [(0.25, [3, 5, 8, 10]), (100, [])])
def test_measurements_are_spread_over_the_time(clock: list[float], eval_steps: float, measured: list[int]) -> None:
    """Steps of six seconds in a minute: measured after the first step behind every quarter."""
    config = VSDConfig(output_dir="unused", eval_strategy="steps", eval_steps=eval_steps)
    budget, state = TimeBudget(1), TrainerState(is_world_process_zero=False)
    budget.on_train_begin(config, state, TrainerControl())
    found, stopped = [], []
    for step in range(1, 11):
        clock[0] += 6
        control = TrainerControl()
        budget.on_step_end(config, state, control)
        found += [step] if control.should_evaluate else []
        stopped += [step] if control.should_training_stop else []
        with budget.paused():
            clock[0] += 50
    assert (found, stopped) == (measured, [10])


def test_checkpoints_and_logs_are_spread_over_the_time_and_the_end_is_saved(clock: list[float]) -> None:
    """Steps of seven seconds in a minute: the last step is behind no third."""
    config = VSDConfig(output_dir="unused", save_steps=0.33, logging_steps=0.5)
    budget, state = TimeBudget(1), TrainerState(is_world_process_zero=False)
    budget.on_train_begin(config, state, TrainerControl())
    controls = [TrainerControl() for _ in range(9)]
    for control in controls:
        clock[0] += 7
        budget.on_step_end(config, state, control)
    assert [step for step, control in enumerate(controls, start=1) if control.should_save] == [3, 6, 9]
    assert [step for step, control in enumerate(controls, start=1) if control.should_log] == [5, 9]
    never = VSDConfig(output_dir="unused", save_strategy="no", save_steps=0.33)
    budget.on_step_end(never, state, last := TrainerControl())
    assert last.should_training_stop and not last.should_save


def test_a_resumed_run_has_what_is_left_of_its_time(clock: list[float]) -> None:
    config = VSDConfig(output_dir="unused")
    budget, state, control = TimeBudget(1), TrainerState(is_world_process_zero=False), TrainerControl()
    budget.on_train_begin(config, state, control)
    budget.go_on(minutes=0.75)
    assert budget.rate(warm_up=0.1, anneal=True) < 0.2  # where it was, not warming up again
    clock[0] += 7.5
    budget.on_step_end(config, state, control)
    assert (budget.progress, control.should_training_stop) == (0.875, False)
    clock[0] += 7.5
    budget.on_step_end(config, state, control)
    assert (budget.progress, control.should_training_stop) == (1.0, True)
