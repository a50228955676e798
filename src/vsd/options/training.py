"""How a drafter is trained: choices of this project, and the central fields of `transformers.TrainingArguments`.

`vsd.training.VSDConfig` inherits from these classes and from `TrainingArguments`, which brings all other fields.
Many small steps are better than few large ones.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ObjectiveOptions:
    """objective

    Attributes:
        objective: training objective; `vsd objectives` lists them
        objective_options: options of the objective, which `vsd objectives NAME` lists; they are added to the recipe's
        draft_steps: number K of draft steps that are trained
        ramp: share of the training during which K grows from 1 to draft_steps
        locality: share of the training during which the blocks of a new block drafter attend mostly to the text near
            their root; 0: they attend to all of it from the start, and learn slowly; not for objectives on draft trees
        temperature: sampling temperature in serving, for the rules target and rejection; 1 for greedy serving
    """

    objective: str = "eagle3"
    objective_options: dict[str, Any] = field(default_factory=dict)
    draft_steps: int = 5
    ramp: float = 0.0
    locality: float = 0.5
    temperature: float = 1.0


@dataclass
class OptimisationOptions:
    """optimisation

    Attributes:
        max_minutes: train for this time instead of max_steps; the learning rate then follows the clock
        max_steps: number of optimiser steps; -1: num_train_epochs decides
        num_train_epochs: passes over the training text
        learning_rate: peak learning rate of AdamW; by default 1e-3 for a drafter of up to 20 million parameters, and
            less for a larger one: 1e-4 for 430 million
        lr_scheduler_type: schedule of the learning rate: cosine, linear, constant_with_warmup, …
        warmup_steps: steps of linear warm-up; below 1: share of the training
        weight_decay: weight decay of AdamW
        adam_beta2: decay of AdamW's second moment
        max_grad_norm: largest norm of the gradient; larger gradients are scaled down
        per_device_train_batch_size: conversations in a batch, on every device
        gradient_accumulation_steps: batches of an optimiser step
        bf16: compute in bfloat16, with float32 master weights; by default where the device is faster with it
        seed: seed of initial weights, data order and sampled paths
    """

    max_minutes: float | None = None
    max_steps: int = -1
    num_train_epochs: float = 3.0
    learning_rate: float | None = None
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    weight_decay: float = 0.0
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    bf16: bool | None = None
    seed: int = 42


@dataclass
class MeasurementOptions:
    """measurement and checkpoints

    Attributes:
        eval_steps: measure τ on the held-out prompts after this many steps; below 1: share of the training
        patience: end the training after this many measurements without a better τ
        eval_max_new_tokens: longest answer in tokens when τ is measured
        eval_batch: prompts that are decoded together when τ is measured
        tree: draft tree that τ is measured with, depth x top_k x nodes
        logging_steps: log the loss after this many steps; below 1: share of the training
        report_to: trackers: tensorboard, wandb, …, or none
        save_steps: write a checkpoint after this many steps; below 1: share of the training
        save_total_limit: number of checkpoints that are kept
    """

    eval_steps: float = 250
    patience: int | None = None
    eval_max_new_tokens: int = 64
    eval_batch: int = 32
    tree: str = "5x4x12"
    logging_steps: float = 20
    report_to: str | list[str] = "tensorboard"
    save_steps: float = 250
    save_total_limit: int | None = 2
