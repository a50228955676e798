"""Training for a given time: the learning rate is a function of elapsed time instead of steps.

Measurements of τ do not count as elapsed time.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

UNLIMITED_STEPS = 10**9
_UNTOLD = {"total_flos", "train_samples_per_second", "train_steps_per_second"}  # not true of a run that a clock ends


class TimeBudget(TrainerCallback):
    """Stops training after a given time and shows progress. All processes use the elapsed time of the first process."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.start: float | None = None
        self.progress = 0.0  # elapsed share of the time after the last step, 0 … 1
        self.loss = math.nan
        self.bar = Progress(
            TextColumn("training"), BarColumn(), TextColumn("{task.fields[info]}"), TimeRemainingColumn()
        )
        self.task = self.bar.add_task("", total=self.seconds, info="")

    @property
    def minutes(self) -> float:
        """Minutes of training so far."""
        return self.progress * self.seconds / 60

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the enclosed work from the elapsed time."""
        before = time.perf_counter()
        try:
            yield
        finally:
            if self.start is not None:
                self.start += time.perf_counter() - before

    def go_on(self, minutes: float) -> None:
        """Add the minutes that the resumed run has already trained."""
        self.progress = min(1.0, 60 * minutes / self.seconds)
        self.start = time.perf_counter() - self.progress * self.seconds

    def rate(self, warm_up: float, anneal: bool) -> float:
        """Learning-rate factor: linear warm-up over the first share `warm_up` of the time, then 1 or a cosine to 0."""
        if self.progress < warm_up:
            return (self.progress + 1e-3) / warm_up
        if not anneal:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (self.progress - warm_up) / (1 - warm_up)))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to measure the elapsed time."""
        self.start = time.perf_counter()
        if state.is_world_process_zero:
            self.bar.start()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Store the logged values for the progress bar; without a terminal print them."""
        logs = kwargs.get("logs", {})
        self.loss = logs.get("loss", self.loss)
        if state.is_world_process_zero and not self.bar.console.is_terminal:
            told = {name: value for name, value in logs.items() if name not in _UNTOLD}
            numbers = ", ".join(f"{name} {float(value):.4g}" for name, value in told.items())
            print(f"step {state.global_step}, {100 * self.progress:.0f} %: {numbers}", flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop when the time is over, with a checkpoint; evaluate, save and log after every share of the time."""
        assert self.start is not None
        now = torch.tensor((time.perf_counter() - self.start) / self.seconds, device=args.device)
        before, self.progress = self.progress, min(1.0, float(broadcast(now)))
        info = f"step {state.global_step}" + ("" if math.isnan(self.loss) else f", loss {float(self.loss):.2f}")
        self.bar.update(self.task, completed=self.progress * self.seconds, info=info)
        over = self.progress >= 1
        control.should_training_stop |= over
        control.should_save |= args.save_strategy == "steps" and (over or self._due(args.save_steps, before))
        control.should_evaluate |= args.eval_strategy == "steps" and self._due(args.eval_steps, before)
        control.should_log |= args.logging_strategy == "steps" and self._due(args.logging_steps, before)

    def _due(self, share: float | None, before: float) -> bool:
        """Whether a multiple of a share of the time has passed since `before`; 1 and more are steps, not shares."""
        if not share or share >= 1:
            return False
        return int(self.progress / share + 1e-6) > int(before / share + 1e-6)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the progress bar."""
        self.bar.stop()
