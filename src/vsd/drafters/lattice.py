"""A head whose q is a Markov chain on a lattice: the n likeliest tokens of every position, by their own logits.

    u_t = W s_t                                        logits of position t alone, from its state s_t
    q(z_t | x, z_{t-1}) ∝ exp(u_t(z_t) + e(z_t) · f_t)      for the n tokens z_t with the largest u_t; else 0

f_t [r] depends on the state and on the token before, e is a codebook [V, r]. Losses need n columns, not V.

Legend: h hidden, r rank, n candidates, V vocabulary; other dimensions are free.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Lattice(NamedTuple):
    """The head of states [..., h + r], which are [s_t ; f_t].

    Attributes:
        unary: W [V, h].
        codebook: e [V, r].
        top_k: n.
    """

    unary: Tensor
    codebook: Tensor
    top_k: int


Head = Tensor | Lattice
"""An LM head [Vd, h], or a lattice."""


class Candidates(NamedTuple):
    """The n candidates of some positions: tokens [..., n], their e [..., n, r], and scores u + e · f [..., n]."""

    tokens: Tensor
    codes: Tensor
    scores: Tensor


def candidates(unary: Tensor, context: Tensor, codebook: Tensor, top_k: int) -> Candidates:
    """The candidates of positions with logits u [..., V] and f [..., r]; both may broadcast."""
    values, tokens = unary.topk(top_k)
    codes = codebook[tokens]
    edges = (codes @ context[..., None])[..., 0]
    return Candidates(tokens, codes, values + edges.to(values.dtype))


def whole(found: Candidates, size: int) -> Tensor:
    """Scores [..., V] of all `size` tokens; -inf for those that are no candidates."""
    tokens, scores = torch.broadcast_tensors(found.tokens, found.scores)
    none: Tensor = scores.new_full((*scores.shape[:-1], size), float("-inf"))
    return none.scatter(-1, tokens, scores)


def logits(states: Tensor, head: Head) -> Tensor:
    """Logits [..., Vd] of states [..., h], whatever the head."""
    if isinstance(head, Tensor):
        found: Tensor = states @ head.T
        return found
    width = head.unary.shape[1]
    unary = states[..., :width].to(head.unary.dtype) @ head.unary.T
    return whole(candidates(unary, states[..., width:], head.codebook, head.top_k), len(head.unary))
