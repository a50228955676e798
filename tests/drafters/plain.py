"""Plain operations in float64, one head and one position at a time, for references of drafters."""

from collections.abc import Sequence

import torch
from torch import Tensor


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


def attend(queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """queries [heads, D] over keys and values, [kv heads, D] each -> [heads · D]."""
    share = len(queries) // len(keys[0])
    out = []
    for head, query in enumerate(queries):
        kv = head // share
        weights = torch.stack([query @ key[kv] / len(query) ** 0.5 for key in keys]).softmax(0)
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
