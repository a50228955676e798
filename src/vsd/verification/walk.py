"""Rules `greedy` and `target`: a walk to the child that the target chooses (EAGLE, Li et al., 2401.15077).

At temperature 0 the choice is the argmax. Above it, EAGLE's rule tries the children of a node one after another: it
accepts a child if u ≤ p[child], else removes the child from p and renormalises, and draws the bonus token from the
remaining p. The outcome has the law of one draw from p: a draw that is a child is accepted, any other draw is the bonus
token. So both rules are one walk, the acceptance probability at a node is the sum of p over its distinct children, and
the output's law is exactly p.

Legend: B batch, N nodes, R rows still walking, V vocabulary, A longest accepted path, root included.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vsd.paths import Tree


class Verdict(NamedTuple):
    """Outcome of a verification pass.

    Attributes:
        nodes: accepted nodes in path order, the root first, [B, A]; padded with any node index after counts[b].
        counts: number of accepted nodes, root included, [B]; also the number of new tokens, bonus token included.
        bonus: the token that the target adds after the last accepted node, [B].
    """

    nodes: Tensor
    counts: Tensor
    bonus: Tensor


def follow(tree: Tree, choice: Tensor) -> Verdict:
    """The walk from the root to the children that equal the target's choice [B, N] at their parent."""
    matches = tree.tokens == choice.gather(1, tree.parents)
    matches[:, 0] = True
    accepted = matches
    for _ in range(int(tree.depths.max())):
        accepted = matches & accepted.gather(1, tree.parents)
    return path_of(accepted, choice)


def walk(tree: Tree, choose: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """`follow`, with the target's choice computed only at the nodes that the walk visits.

    Args:
        tree: the draft.
        choose: the target's choice [R] for rows [R] at nodes [R]; called level by level, from the root down.
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
    """The verdict for accepted nodes [B, N] bool that form one path from the root in every row."""
    N = accepted.shape[1]
    counts = accepted.sum(1)
    order = torch.arange(N, device=accepted.device).expand_as(accepted)
    nodes = torch.where(accepted, order, N).sort(dim=1).values[:, : int(counts.max())].clamp(max=N - 1)
    last = nodes.gather(1, counts[:, None] - 1)
    return Verdict(nodes, counts, choice.gather(1, last)[:, 0])
