"""Rules `greedy` and `target`: let the target choose a token at a node, and walk where its choices lead.

At temperature 0 the choice is the argmax. Above it, EAGLE's rule tries a node's children one after another, accepting
with u ≤ p[child], else removing the child and renormalising, and draws the bonus token from what is left. That is the
law of one draw from p: the draw is followed if it is a child, else it is the bonus token. So both rules are one walk,
a node's acceptance probability is the sum of p over its distinct children, and the output's law is exactly p.

Legend: B batch, N nodes, R rows still walking, V vocabulary, A longest accepted path, root included.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vsd.paths import Tree


class Verdict(NamedTuple):
    """What a verification pass decided.

    Attributes:
        nodes: accepted nodes in path order, the root first, [B, A]; beyond counts[b] of no meaning, but valid.
        counts: number of accepted nodes, root included, [B]: also the number of new tokens.
        bonus: the token the target adds after the last accepted node, [B].
    """

    nodes: Tensor
    counts: Tensor
    bonus: Tensor


def follow(tree: Tree, choice: Tensor) -> Verdict:
    """Walk from the root along the children that equal the target's choice [B, N] at their parent."""
    matches = tree.tokens == choice.gather(1, tree.parents)
    matches[:, 0] = True
    accepted = matches
    for _ in range(int(tree.depths.max())):
        accepted = matches & accepted.gather(1, tree.parents)
    return path_of(accepted, choice)


def walk(tree: Tree, choose: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """`follow`, asking for the target's choice only at the nodes where the walk comes by.

    Args:
        choose: given rows [R] and the node [R] each is at, the target's choice there [R]; called level by level.
    """
    choice, accepted = torch.zeros_like(tree.tokens), torch.zeros_like(tree.tokens, dtype=torch.bool)
    rows = torch.arange(len(choice), device=choice.device)
    nodes = torch.zeros_like(rows)
    while len(rows):
        accepted[rows, nodes] = True
        tokens = choose(rows, nodes)
        choice[rows, nodes] = tokens
        children = (tree.parents[rows] == nodes[:, None]) & (tree.tokens[rows] == tokens[:, None])  # [R, N]
        children[:, 0] = False  # the root is its own parent
        onward = children.any(1)
        rows, nodes = rows[onward], children[onward].int().argmax(1)
    return path_of(accepted, choice)


def path_of(accepted: Tensor, choice: Tensor) -> Verdict:
    """The verdict for a set of accepted nodes [B, N] (bool) that forms one path from the root of each row."""
    N = accepted.shape[1]
    counts = accepted.sum(1)
    order = torch.arange(N, device=accepted.device).expand_as(accepted)
    nodes = torch.where(accepted, order, N).sort(dim=1).values[:, : int(counts.max())].clamp(max=N - 1)
    last = nodes.gather(1, counts[:, None] - 1)
    return Verdict(nodes, counts, choice.gather(1, last)[:, 0])
