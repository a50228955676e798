"""Paths drawn from the drafter, scored by the target: the E-step's raw material.

All paths of a sequence share its key/value cache; equal prefixes below one root are one node; a single target pass
with a tree mask scores every node: T + nodes tokens instead of paths × (T + K).

Legend: B sequences, T tokens, P paths of a sequence (those of one anchor side by side), K steps, N nodes, h hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vsd.drafters import Eagle3Drafter
from vsd.targets import Target


class Trie(NamedTuple):
    """P paths as trees: tokens, positions, context [B, N]; ancestors [B, N, N] bool; node [B, P, K] of every token.

    `context` is how much of the sequence a node sees: all up to its path's root + 1. Rows with fewer nodes are filled
    up with nodes that see only themselves and the sequence's first token.
    """

    tokens: Tensor
    positions: Tensor
    context: Tensor
    ancestors: Tensor
    node: Tensor


class Scored(NamedTuple):
    """What the target says along drawn paths; equal prefixes share a row.

    Attributes:
        hidden: its final hidden states, [U, h].
        log_normaliser: logsumexp of its logits there, [U].
        rows: the row that predicts each path's token k, [B, P, K].
        log_p: its log-probability of that token, [B, P, K].
    """

    hidden: Tensor
    log_normaliser: Tensor
    rows: Tensor
    log_p: Tensor


def draw_paths(
    drafter: Eagle3Drafter,
    target: Target,
    aux: Tensor,
    ids: Tensor,
    roots: Tensor,
    steps: int,
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """A path below every root by ancestral sampling: tokens [B, P, K] and their log q at temperature 1, [B, P, K].

    Args:
        aux: target features, [B, T, 3h].
        ids: the text, [B, T].
        roots: entries to draw from, [B, P]; repeat one for several paths.
        temperature: > 0, of the sampling.
    """
    tokens, log_q = [], []
    draft_ids = drafter.draft_ids()

    def choose(log_probs: Tensor) -> Tensor:
        law = (log_probs / temperature).softmax(-1)
        drawn = torch.multinomial(law.flatten(0, 1), 1, generator=generator).view(*roots.shape, 1)
        tokens.append(draft_ids[drawn[..., 0]])
        log_q.append(log_probs.gather(-1, drawn)[..., 0])
        return target.embed(tokens[-1])

    first = target.embed(ids.gather(1, roots + 1))
    drafter.sample(aux, target.embed(ids.roll(-1, dims=1)), roots, first, steps, choose)
    return torch.stack(tokens, -1), torch.stack(log_q, -1)


def merge(roots: Tensor, tokens: Tensor) -> Trie:
    """Paths [B, P, K] below roots [B, P] with equal prefixes merged; parents come before their children."""
    B, P, K = tokens.shape
    alike = (tokens[:, :, None] == tokens[:, None]) & (roots[:, :, None] == roots[:, None])[..., None]
    alike = alike.long().cumprod(-1).bool()  # [B, P, P, K]: the first k tokens agree
    first = alike.long().argmax(2)  # [B, P, K]: the first path with that prefix
    fresh = (first == torch.arange(P, device=tokens.device)[:, None]).transpose(1, 2).flatten(1)  # [B, K P]
    number = fresh.long().cumsum(1) - 1  # index among the nodes, level by level
    node = number.view(B, K, P).transpose(1, 2).gather(1, first)  # [B, P, K]
    N = int(fresh.sum(1).max())
    place = node.flatten(1)  # [B, P K]

    def spread(values: Tensor) -> Tensor:
        return torch.zeros(B, N, dtype=torch.long, device=tokens.device).scatter(1, place, values.flatten(1))

    depth = torch.arange(K, device=tokens.device).expand(B, P, K)
    top = roots[..., None].expand(B, P, K)
    own = torch.eye(N, dtype=torch.bool, device=tokens.device).expand(B, N, N)
    ancestors = own.clone()
    row = torch.arange(B, device=tokens.device)[:, None]
    for above in range(K):
        for below in range(above + 1, K):
            ancestors[row, node[..., below], node[..., above]] = True
    # A filler's context is 1, not 0: the first token, so that no mask row depends on rounding.
    context = spread(top + 1) + 1
    return Trie(spread(tokens), spread(top + 2 + depth), context, ancestors, node)


@torch.no_grad()
def score_paths(target: Target, ids: Tensor, lengths: Tensor, roots: Tensor, tokens: Tensor) -> Scored:
    """The target's opinion of paths [B, P, K] below roots [B, P] of right-padded sequences ids [B, T]."""
    B, P, K = tokens.shape
    trie = merge(roots, tokens[..., :-1]) if K > 1 else None
    nodes = 0 if trie is None else trie.tokens.shape[1]
    cache = target.new_cache(B, ids.shape[1] + nodes)
    text = target.prefill(ids, lengths, cache).hidden
    hidden = text.gather(1, (roots + 1)[..., None].expand(-1, -1, text.shape[-1]))  # what predicts first tokens
    rows = (roots[:, :, None] == roots[:, None]).long().argmax(2)[..., None]  # [B, P, 1] the first path of the anchor
    if trie is not None:
        output = target.forward(trie.tokens, trie.positions, trie.ancestors, cache, trie.context)
        hidden = torch.cat([hidden, output.hidden], dim=1)  # [B, P + N, h]
        rows = torch.cat([rows, P + trie.node], dim=-1)
    rows = rows + (P + nodes) * torch.arange(B, device=ids.device)[:, None, None]
    hidden = hidden.flatten(0, 1)
    used, where = rows.unique(return_inverse=True)
    hidden = hidden[used]
    normaliser = torch.cat([target.logits(some).logsumexp(-1) for some in hidden.split(256)])
    return Scored(hidden, normaliser, where, target.logit(hidden[where], tokens) - normaliser[where])
