"""Configuration of training: the options of `vsd.options.training` on top of `transformers.TrainingArguments`."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments

from vsd.errors import ConfigurationError
from vsd.objective import objective
from vsd.options import MeasurementOptions, ObjectiveOptions, OptimisationOptions
from vsd.options.bounds import check_bounds
from vsd.paths import TreeShape
from vsd.targets.load import fastest_dtype
from vsd.training.budget import UNLIMITED_STEPS
from vsd.training.trackers import check_trackers

CLOCKED = ("cosine", "constant_with_warmup", "constant")  # schedules of a run that ends by the clock


def bfloat16_pays(use_cpu: bool = False) -> bool:
    """Whether the training device multiplies bfloat16 faster than float32."""
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return fastest_dtype(accelerator or torch.device("cpu")) is torch.bfloat16


@dataclass
class VSDConfig(ObjectiveOptions, OptimisationOptions, MeasurementOptions, TrainingArguments):  # type: ignore[misc]
    """Configuration of a training run.

    Attributes:
        given: the values of all fields before device-dependent defaults are filled in.

    Raises:
        ConfigurationError: a value that has no meaning, an option that the objective does not have, or a tracker that
            is not installed.
    """

    train_sampling_strategy: str = "group_by_length"
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        self.given: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        self._check()
        self.use_cpu |= not torch.accelerator.is_available()  # transformers accepts bf16 on a CPU only with use_cpu
        self.bf16 = bfloat16_pays(self.use_cpu) if self.bf16 is None else self.bf16
        if self.max_minutes is not None:
            self.max_steps, self.disable_tqdm = UNLIMITED_STEPS, True
        super().__post_init__()
        check_trackers(self.report_to)  # a list by now

    def _check(self) -> None:
        """Refuse invalid settings before the target is loaded and features are computed."""
        check_bounds(self.given)
        if self.temperature <= 0:
            raise ConfigurationError(
                f"temperature must be positive, not {self.temperature:g}: for greedy serving it is 1"
            )
        if self.max_minutes is not None:
            self._check_clock()
        objective(self.objective, self.objective_options)
        TreeShape.parse(self.tree)

    def _check_clock(self) -> None:
        """The learning rate of a run that ends by the clock follows the clock: steps have no meaning for it."""
        if self.warmup_steps and self.warmup_steps >= 1:
            raise ConfigurationError(
                f"warmup_steps {self.warmup_steps:g} are steps, and with max_minutes the learning rate follows the "
                "clock: give a share of the time below 1"
            )
        if (schedule := SchedulerType(self.lr_scheduler_type).value) not in CLOCKED:
            raise ConfigurationError(
                f"lr_scheduler_type {schedule} counts steps: with max_minutes choose {', '.join(CLOCKED)}, "
                "or give max_steps instead"
            )
