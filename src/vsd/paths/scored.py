"""Drafted paths scored by the target: log p of every token, from one pass over all paths of a batch.

All paths of a sequence share its key/value cache; equal prefixes below one root are one node; a single target pass
with a tree mask scores every node: T + nodes tokens instead of paths × (T + K).

Legend: B sequences, T tokens, P paths of a sequence (those of one anchor side by side), K steps, N nodes, h hidden,
U rows of the target.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vsd.paths.entries import rows_at
from vsd.targets import Padded, Prefill, Target


class Trie(NamedTuple):
    """P paths as trees: tokens, root entry, depth and context [B, N]; ancestors [B, N, N] bool; node [B, P, K].

    `context` counts the tokens of the sequence that a node sees: all up to its path's root + 1. Rows with fewer nodes
    are filled up with nodes that see only themselves and the sequence's first token.
    """

    tokens: Tensor
    top: Tensor
    depths: Tensor
    context: Tensor
    ancestors: Tensor
    node: Tensor


class Scored(NamedTuple):
    """The target along drafted paths; equal prefixes share a row.

    Attributes:
        hidden: final hidden states, [U, h].
        log_normaliser: logsumexp of the logits of each, [U].
        rows: the row that predicts each path's token k, [B, P, K].
        log_p: log-probability of that token, [B, P, K].
    """

    hidden: Tensor
    log_normaliser: Tensor
    rows: Tensor
    log_p: Tensor


def merge(roots: Tensor, tokens: Tensor) -> Trie:
    """Paths [B, P, K] below roots [B, P] with equal prefixes merged; parents come before their children.

    What is behind a path's end (`NO_TOKEN`) is no node; `node` is 0 there.
    """
    B, P, K = tokens.shape
    exists = tokens >= 0
    alike = (tokens[:, :, None] == tokens[:, None]) & (roots[:, :, None] == roots[:, None])[..., None]
    alike = alike.long().cumprod(-1).bool()  # [B, P, P, K]: the first k tokens agree
    first = alike.long().argmax(2)  # [B, P, K]: the first path with that prefix
    fresh = (first == torch.arange(P, device=tokens.device)[:, None]) & exists
    fresh = fresh.transpose(1, 2).flatten(1)  # [B, K P]
    number = fresh.long().cumsum(1) - 1  # index among the nodes, level by level
    node = number.view(B, K, P).transpose(1, 2).gather(1, first).masked_fill(~exists, 0)  # [B, P, K]
    N = int(fresh.sum(1).max())
    place = node.masked_fill(~exists, N).flatten(1)  # [B, P K]

    def spread(values: Tensor) -> Tensor:
        wide = torch.zeros(B, N + 1, dtype=torch.long, device=tokens.device)
        return wide.scatter(1, place, values.flatten(1))[:, :N]

    depth = torch.arange(K, device=tokens.device).expand(B, P, K)
    top = roots[..., None].expand(B, P, K)
    own = torch.eye(N, dtype=torch.bool, device=tokens.device).expand(B, N, N)
    ancestors = torch.nn.functional.pad(own, (0, 1, 0, 1))
    row, spot = torch.arange(B, device=tokens.device)[:, None], place.view(B, P, K)
    for above in range(K):
        for below in range(above + 1, K):
            ancestors[row, spot[..., below], spot[..., above]] = True
    # A filler's context is 1, not 0: the first token, so that no mask row depends on rounding.
    context = spread(top + 1) + 1
    return Trie(spread(tokens), spread(top), spread(depth), context, ancestors[:, :N, :N], node)


@torch.no_grad()
def score_paths(
    target: Target,
    text: Padded,
    roots: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    prefill: Prefill | None = None,
) -> Scored:
    """Score paths [B, P, K] below roots [B, P] of texts by the target's distribution at a temperature.

    Paths may end early, in `NO_TOKEN`; scores of steps that do not exist have no meaning.

    Args:
        prefill: of the text, if it was read before; its cache need not grow where it has room for P (K - 1) tokens.
    """
    B, P, K = tokens.shape
    trie = merge(roots, tokens[..., :-1]) if K > 1 else None
    nodes = 0 if trie is None else trie.tokens.shape[1]
    read, cache = prefill or target.read(text, nodes)[0]
    hidden = rows_at(read, roots + 1)  # predicts the first tokens
    rows = (roots[:, :, None] == roots[:, None]).long().argmax(2)[..., None]  # [B, P, 1] the first path of the anchor
    if trie is not None and nodes:
        behind = text.first_row.gather(1, trie.top + 1) + 1 + trie.depths  # [B, N]
        output = target.forward(trie.tokens, behind, trie.ancestors, cache, trie.context)
        hidden = torch.cat([hidden, output.hidden], dim=1)  # [B, P + N, h]
        later = torch.where(tokens[..., 1:] >= 0, P + trie.node, rows)
        rows = torch.cat([rows, later], dim=-1)
    del read, cache  # their memory is the logits'
    rows = rows.expand(-1, -1, K) + (P + nodes) * torch.arange(B, device=roots.device)[:, None, None]
    hidden = hidden.flatten(0, 1)
    used, where = rows.unique(return_inverse=True)
    hidden = hidden[used]
    normaliser = target.log_normaliser(hidden, temperature)
    log_p = target.logit(hidden[where], tokens.clamp(min=0)) / temperature - normaliser[where]
    return Scored(hidden, normaliser, where, log_p)
