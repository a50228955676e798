"""Activation checkpointing: the same gradient, with activations recomputed in the backward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_run
from vsd.data import Example
from vsd.targets import Target


@pytest.fixture(scope="module")
def examples(tiny_target: Target) -> list[Example]:
    return tiny_run.tiny_examples(tiny_target, 8)


def one_step(target: Target, examples: list[Example], folder: Path, **options: Any) -> tuple[dict[str, Tensor], int]:
    """Weights after one step of SGD, and how often modules of the drafter were called."""
    sgd = {"optim": "sgd", "max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-2, "max_grad_norm": 1e9}
    trainer = tiny_run.tiny_trainer(target, examples, folder, **sgd, **options)
    drafter, calls = trainer.model, 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    assert isinstance(drafter, nn.Module)
    for module in drafter.modules():
        module.register_forward_hook(count)
    trainer.train()
    return {name: weight.detach().clone() for name, weight in drafter.named_parameters()}, calls


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("eagle3", {}),
        ("eagle3", {"smoothing": 0.3}),
        ("vsd", {"anchors": 3, "length": 4}),
        ("vsd", {"rule": "rejection", "e_step": "drafted", "samples": 3, "every": 1}),
    ],
    ids=["recorded", "cut", "continued", "drafted"],
)
def test_the_gradient_is_the_same(
    tiny_target: Target, examples: list[Example], tmp_path: Path, objective: str, options: dict[str, Any]
) -> None:
    choice = {"objective": objective, "objective_options": options}
    start = dict(tiny_run.tiny_drafter(tiny_target, examples).named_parameters())
    wanted, once = one_step(tiny_target, examples, tmp_path, **choice)
    found, more = one_step(tiny_target, examples, tmp_path, gradient_checkpointing=True, **choice)
    assert more > once, "nothing was recomputed"
    for name, weight in wanted.items():
        assert not torch.equal(weight, start[name]), name
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7, msg=name)
