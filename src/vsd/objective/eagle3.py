"""EAGLE-3's training-time test (arXiv:2503.01840, §3.2): cross-entropy on the recorded continuation, 0.8^k a step.

Predicted tokens are laid out by where they stand: row q of every step is the same recorded token, scored once from
the root just before it (step 0), once from the root before that (step 1), and so on. A drafter's hidden states come
by root, so step k is shifted by k rows.

Legend: K steps, B batch, Q drafted tokens of a sequence, h hidden.
"""

import torch
from torch import Tensor

DECAY = 0.8


def step_weights(drafted: Tensor, valid: Tensor, steps: int, decay: float = DECAY) -> Tensor:
    """Weight of every (step, drafted token), [K, B, Q]: decay^k, or 0 where no path of that length ends there.

    Args:
        drafted: positions of the drafted tokens, ascending, [B, Q].
        valid: which of them are not padding, [B, Q] bool.
    """
    weights = torch.zeros(steps, *drafted.shape, device=drafted.device)
    for k in range(min(steps, drafted.shape[1])):
        reach = drafted[:, k:] - drafted[:, : drafted.shape[1] - k] == k  # the k tokens before are of the same answer
        weights[k, :, k:] = decay**k * (reach & valid[:, k:])
    return weights


def align(hidden: Tensor) -> Tensor:
    """From rows by root to rows by predicted token: shift step k of hidden [K, B, Q, h] by k."""
    Q = hidden.shape[2]
    return torch.stack([torch.nn.functional.pad(h, (0, 0, k, 0))[:, :Q] for k, h in enumerate(hidden)])
