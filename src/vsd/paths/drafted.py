"""Paths the drafter proposes, sampled or as the leaves of decoding's tree, scored by the target: the E-step's material.

All paths of a sequence share its key/value cache; equal prefixes below one root are one node; a single target pass
with a tree mask scores every node: T + nodes tokens instead of paths × (T + K).

Legend: B sequences, A anchors, T tokens, P paths of a sequence (those of one anchor side by side), L leaves of a tree,
K steps, N nodes, h hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vsd.drafters import Eagle3Drafter
from vsd.paths.tree import NO_TOKEN, Tree, TreeShape, draw_tree
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
    served: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A path below every root by ancestral sampling: tokens [B, P, K] and their log q as served, [B, P, K].

    Args:
        aux: target features, [B, T, 3h].
        ids: the text, [B, T].
        roots: entries to draw from, [B, P]; repeat one for several paths.
        temperature: > 0, of the sampling from q as served.
        served: temperature at which the drafter is served, > 0.
    """
    tokens, log_q = [], []
    draft_ids = drafter.draft_ids()

    def choose(log_probs: Tensor) -> Tensor:
        log_probs = log_probs if served == 1 else (log_probs / served).log_softmax(-1)
        law = (log_probs / temperature).softmax(-1)
        drawn = torch.multinomial(law.flatten(0, 1), 1, generator=generator).view(*roots.shape, 1)
        tokens.append(draft_ids[drawn[..., 0]])
        log_q.append(log_probs.gather(-1, drawn)[..., 0])
        return target.embed(tokens[-1])

    first = target.embed(ids.gather(1, roots + 1))
    drafter.sample(aux, target.embed(ids.roll(-1, dims=1)), roots, first, steps, choose)
    return torch.stack(tokens, -1), torch.stack(log_q, -1)


@torch.no_grad()
def draw_trees(
    drafter: Eagle3Drafter, target: Target, aux: Tensor, ids: Tensor, roots: Tensor, shape: TreeShape
) -> tuple[Tensor, Tensor]:
    """The trees that decoding would propose below roots [B, A], as the paths to their leaves.

    Args:
        aux: target features, [B, T, 3h].
        ids: the text, [B, T].

    Returns:
        Tokens [B, A, L, K], `NO_TOKEN` behind a leaf (a tree with fewer leaves ends in empty paths); and which tokens
        no earlier path of the tree has in the same place, [B, A, L, K] bool: one for every node.
    """
    cache, hidden = drafter.stand(aux, target.embed(ids.roll(-1, dims=1)), roots, shape.depth * shape.top_k)
    tree = draw_tree(drafter, target.embed, hidden, ids.gather(1, roots + 1).flatten(), cache, shape)
    tokens, fresh = (field.unflatten(0, roots.shape) for field in leaf_paths(tree, shape.depth))
    return tokens, fresh


def leaf_paths(tree: Tree, steps: int) -> tuple[Tensor, Tensor]:
    """Paths from below the root to every leaf of a batch of trees [R, N]; see `draw_trees`."""
    R, N = tree.tokens.shape
    leaf = torch.ones(R, N, dtype=torch.bool, device=tree.tokens.device).scatter(1, tree.parents, False)
    leaf[:, 0] = False
    L = int(leaf.sum(1).max())
    node = leaf.int().argsort(dim=1, descending=True, stable=True)[:, :L]  # [R, L] the leaves, then others
    node = node.masked_fill(~leaf.gather(1, node), 0)
    nodes = torch.zeros(R, L, steps + 1, dtype=torch.long, device=node.device)
    for _ in range(steps):
        nodes.scatter_(2, tree.depths.gather(1, node)[..., None], node[..., None])
        node = tree.parents.gather(1, node)
    nodes = nodes[..., 1:]  # [R, L, K]; 0, the root, behind a leaf
    first = (nodes[:, :, None] == nodes[:, None]).long().argmax(2)  # [R, L, K]
    fresh = (first == torch.arange(L, device=node.device)[:, None]) & (nodes > 0)
    tokens = tree.tokens.gather(1, nodes.flatten(1)).view_as(nodes)
    return tokens.masked_fill(nodes == 0, NO_TOKEN), fresh


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
    return Trie(spread(tokens), spread(top + 2 + depth), context, ancestors[:, :N, :N], node)


@torch.no_grad()
def score_paths(
    target: Target, ids: Tensor, lengths: Tensor, roots: Tensor, tokens: Tensor, temperature: float = 1.0
) -> Scored:
    """The target's opinion of paths [B, P, K] below roots [B, P] of right-padded sequences ids [B, T].

    Its law is taken at `temperature`. Paths may end early, in `NO_TOKEN`; what is said of steps that do not exist has
    no meaning.
    """
    B, P, K = tokens.shape
    trie = merge(roots, tokens[..., :-1]) if K > 1 else None
    nodes = 0 if trie is None else trie.tokens.shape[1]
    cache = target.new_cache(B, ids.shape[1] + nodes)
    text = target.prefill(ids, lengths, cache).hidden
    hidden = text.gather(1, (roots + 1)[..., None].expand(-1, -1, text.shape[-1]))  # what predicts first tokens
    rows = (roots[:, :, None] == roots[:, None]).long().argmax(2)[..., None]  # [B, P, 1] the first path of the anchor
    if trie is not None and nodes:
        output = target.forward(trie.tokens, trie.positions, trie.ancestors, cache, trie.context)
        hidden = torch.cat([hidden, output.hidden], dim=1)  # [B, P + N, h]
        later = torch.where(tokens[..., 1:] >= 0, P + trie.node, rows)
        rows = torch.cat([rows, later], dim=-1)
    rows = rows.expand(-1, -1, K) + (P + nodes) * torch.arange(B, device=ids.device)[:, None, None]
    hidden = hidden.flatten(0, 1)
    used, where = rows.unique(return_inverse=True)
    hidden = hidden[used]
    normaliser = target.log_normaliser(hidden, temperature)
    log_p = target.logit(hidden[where], tokens.clamp(min=0)) / temperature - normaliser[where]
    return Scored(hidden, normaliser, where, log_p)
