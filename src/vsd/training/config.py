"""Options of training: those of `transformers.TrainingArguments`, with defaults for drafters, and a few of our own."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from vsd.errors import VSDError
from vsd.objective import OBJECTIVES, objective
from vsd.targets.load import fastest_dtype
from vsd.training.budget import UNLIMITED_STEPS


def bfloat16_pays(use_cpu: bool = False) -> bool:
    """Whether the device that training will run on multiplies bfloat16 faster than float32."""
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return fastest_dtype(accelerator or torch.device("cpu")) is torch.bfloat16


@dataclass
class VSDConfig(TrainingArguments):
    """What a drafter is trained with.

    Defaults suit a drafter of about ten million parameters: many small steps beat few large ones.
    """

    objective: str = field(default="eagle3", metadata={"help": f"what is trained for: {', '.join(OBJECTIVES)}"})
    objective_options: dict = field(
        default_factory=dict, metadata={"help": "options of the objective, as {name: value}"}
    )
    draft_steps: int = field(default=5, metadata={"help": "steps K of the training-time test"})
    ramp: float = field(
        default=0.0, metadata={"help": "share of the training over which K grows from 1 to draft_steps"}
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "temperature the drafter is served at, by rules target and rejection; leave 1 for greedy"},
    )
    eval_max_new_tokens: int = field(default=64, metadata={"help": "answer length when τ is measured"})
    eval_batch: int = field(default=32, metadata={"help": "prompts decoded at once when τ is measured"})
    depth: int = field(default=5, metadata={"help": "draft tree of the τ measurement: tokens drafted ahead"})
    top_k: int = field(default=4, metadata={"help": "… its beam"})
    nodes: int = field(default=12, metadata={"help": "… its size, root included"})

    max_minutes: float | None = field(
        default=None,
        metadata={"help": "train for so long instead of max_steps; the schedule follows the clock"},
    )

    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "mixed precision: master weights stay float32; default: where this device is faster with it"},
    )
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8
    train_sampling_strategy: str = "group_by_length"
    logging_steps: float = 20
    save_steps: float = 250
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "tensorboard"
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        if self.draft_steps < 1:
            raise VSDError("draft_steps must be at least 1")
        if self.temperature <= 0:
            raise VSDError(f"temperature must be positive, not {self.temperature:g}: for greedy serving leave it 1")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise VSDError(f"max_minutes must be positive, not {self.max_minutes:g}")
        objective(self.objective, self.objective_options)  # complain now, not after the features are computed
        self.use_cpu |= not torch.accelerator.is_available()  # transformers takes bf16 on a CPU only if it is asked for
        self.bf16 = bfloat16_pays(self.use_cpu) if self.bf16 is None else self.bf16
        if self.max_minutes is not None:
            self.max_steps, self.disable_tqdm = UNLIMITED_STEPS, True
        super().__post_init__()
