"""For tests of block drafters: plain operations in float64, one head and one position at a time, and common checks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import along
from vsd.drafters import load_drafter
from vsd.paths import Entries
from vsd.targets import Target


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rope(x: Tensor, position: int, theta: float) -> Tensor:
    """x [heads, D] rotated."""
    half, out = x.shape[-1] // 2, x.clone()
    for i in range(half):
        angle = torch.tensor(position * theta ** (-i / half), dtype=torch.float64)
        a, b = x[:, i], x[:, i + half]
        out[:, i], out[:, i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def attend(queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lost: Tensor | float = 0.0) -> Tensor:
    """queries [heads, D] over keys and values, [kv heads, D] each -> [heads · D]; `lost` is taken off the scores."""
    share = len(queries) // len(keys[0])
    out = []
    for head, query in enumerate(queries):
        kv = head // share
        weights = (torch.stack([query @ key[kv] / len(query) ** 0.5 for key in keys]) - lost).softmax(0)
        out.append(torch.stack([weight * value[kv] for weight, value in zip(weights, values)]).sum(0))
    return torch.cat(out)


def gated(x: Tensor, weights: dict[str, Tensor], prefix: str) -> Tensor:
    """The MLP of a layer."""
    gate, up = weights[f"{prefix}.gate_proj.weight"] @ x, weights[f"{prefix}.up_proj.weight"] @ x
    return weights[f"{prefix}.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)


def randomised(drafter: torch.nn.Module) -> None:
    """Random weights, norms included, so that no two of them can be swapped unnoticed."""
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else torch.randn_like(weight) * 0.15)


def inputs(target: Target, drafter: Any) -> tuple[Tensor, Entries]:
    """Tokens [2, 12], and the entries of the first 11."""
    ids = torch.randint(target.vocab_size, (2, 12), generator=torch.Generator().manual_seed(5))
    read = along.entries(target, ids[:, :11], drafter.needs.layers)
    return ids, read._replace(next_ids=ids[:, 1:])


def check_training(target: Target, drafter: Any, steps: int) -> None:
    """Every weight has a gradient, and activation checkpointing gives the same one."""
    _, entries = inputs(target, drafter)
    paths = along.paths(torch.tensor([[7, 3], [5, 9]]), torch.randint(128, (2, 2, steps)))
    drafter(entries, paths, lambda states, head: (states @ head.T).square().sum()).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in drafter.parameters())
    plainly = {name: weight.grad.clone() for name, weight in drafter.named_parameters() if weight.grad is not None}
    drafter.train().zero_grad()
    drafter.gradient_checkpointing_enable()
    drafter(entries, paths, lambda states, head: (states @ head.T).square().sum()).backward()
    for name, weight in drafter.named_parameters():
        torch.testing.assert_close(weight.grad, plainly[name], rtol=1e-4, atol=1e-5, msg=name)


def check_saved(target: Target, drafter: Any, folder: Path, fields: Sequence[str]) -> None:
    """Saved and loaded bit for bit, and with the same fields of its configuration."""
    drafter.save_pretrained(folder)
    again = load_drafter(folder, target, trainable=True)
    mine, theirs = drafter.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for name in fields:
        assert getattr(again.config, name) == getattr(drafter.config, name), name
