"""Draft trees: their shape, their nodes, and tokens grafted onto them.

The root is the token already decided. Nodes are sorted: a parent's index is always below its children's.

Legend: B batch, N nodes of a tree, L leaves, K steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vsd.errors import ConfigurationError

NO_TOKEN = -1


@dataclass(frozen=True)
class TreeShape:
    """Size of a draft tree. Its text form, `5x4x16`, is the same in flags, recipes, objectives' options and tables.

    Attributes:
        depth: tokens drafted ahead.
        top_k: beam width; 1 drafts a chain.
        nodes: nodes verified in a target pass, root included.
        p_min: smallest cumulative draft probability of a node; less probable nodes are neither verified nor extended.
        lookup: tokens that prompt lookup adds to the tree (`graft`).

    Raises:
        ConfigurationError: a size that no tree has.
    """

    depth: int = 5
    top_k: int = 4
    nodes: int = 12
    p_min: float = 0.0
    lookup: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p_min < 1:
            raise ConfigurationError(f"p_min must be a probability below 1, not {self.p_min:g}")
        if self.lookup < 0:
            raise ConfigurationError(f"lookup must be a number of tokens, not {self.lookup}")
        if min(self.depth, self.top_k) < 1 or self.nodes < 2:
            raise ConfigurationError(f"a draft tree needs depth ≥ 1, top_k ≥ 1 and nodes ≥ 2, not {self}")
        if self.nodes > 1 + self.pool:
            raise ConfigurationError(
                f"depth {self.depth} and top_k {self.top_k} draft {self.pool} nodes: "
                f"nodes must be at most {1 + self.pool}, not {self.nodes}"
            )

    @property
    def pool(self) -> int:
        """Number of nodes drafted before the best are kept."""
        return self.top_k + (self.depth - 1) * self.top_k**2

    def levels(self, reached: int) -> int:
        """Number of drafted levels of a tree whose deepest kept node is at level `reached`."""
        return min(self.depth, reached + 1) if self.p_min else self.depth

    @property
    def deepest(self) -> int:
        """Largest number of levels below the root."""
        return max(self.depth, self.lookup)

    @property
    def largest(self) -> int:
        """Largest number of nodes."""
        return self.nodes + self.lookup

    @property
    def floor(self) -> float:
        """log p_min."""
        return math.log(self.p_min) if self.p_min else -math.inf

    @classmethod
    def chain(cls, depth: int, p_min: float = 0.0) -> "TreeShape":
        """A single path of `depth` tokens."""
        return cls(depth, 1, depth + 1, p_min)

    @classmethod
    def parse(cls, text: str) -> "TreeShape":
        """Read depth x top_k x nodes [x p_min [x lookup]]; one number alone is a chain of this many tokens.

        5x4x16 drafts 5 tokens ahead with a beam of 4 and verifies 16 nodes. 5x4x16x0.05 leaves out nodes below
        probability 0.05, 5x4x16x0x8 adds 8 tokens of prompt lookup, and 5 is 5x1x6.

        Raises:
            ConfigurationError: another form, or a size that no tree has.
        """
        sizes, more = text.split("x")[:3], text.split("x")[3:]
        try:
            if len(sizes) == 1:
                return cls.chain(int(text))
            depth, top_k, nodes = map(int, sizes)
            p_min, lookup = [*more, "0", "0"][: max(2, len(more))]
            return cls(depth, top_k, nodes, float(p_min), int(lookup))
        except ValueError:
            raise ConfigurationError(
                f"a tree is depth x top_k x nodes [x p_min [x lookup]], such as 5x4x16, not '{text}'"
            ) from None

    def __str__(self) -> str:
        more = f"x{self.p_min:g}" * bool(self.p_min or self.lookup) + f"x{self.lookup}" * bool(self.lookup)
        return f"{self.depth}x{self.top_k}x{self.nodes}{more}"


class Tree(NamedTuple):
    """tokens, parents, depths [B, N]; log_q [B, N] cumulative. Node 0 is the root, its own parent."""

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    log_q: Tensor


class Chain(NamedTuple):
    """A sampled path as a tree, the log draft law of each of its tokens [B, K, Vd], the draft vocabulary ids [Vd]."""

    tree: Tree
    draft_logp: Tensor
    ids: Tensor


def ancestors(parents: Tensor, depth: int) -> Tensor:
    """[B, N, N] bool: node j is node i or above it; parents [B, N], no path longer than `depth`."""
    own = torch.eye(parents.shape[1], dtype=torch.bool, device=parents.device).expand(*parents.shape, -1)
    above = own
    for _ in range(depth):
        above = own | above.gather(1, parents[..., None].expand_as(above))
    return above


def best_nodes(pool: Tree, nodes: int) -> Tree:
    """The `nodes` best of a pool whose parents precede their children; the order stays topological under ties."""
    order = pool.log_q.argsort(dim=1, descending=True, stable=True)[:, :nodes]
    rank = torch.zeros_like(pool.tokens).scatter_(
        1, order, torch.arange(nodes, device=order.device).expand_as(order)
    )  # pool index -> node index
    tokens, parents, depths, log_q = (field.gather(1, order) for field in pool)
    return Tree(tokens, rank.gather(1, parents), depths, log_q)


def graft(tree: Tree, chains: Sequence[Sequence[int]]) -> tuple[Tree, Tensor]:
    """Add a path of given tokens below the root of every row, where it leaves the tree.

    Rows that need fewer nodes than others are filled up with children of the root that no target chooses (`NO_TOKEN`).

    Args:
        chains: of every row, the tokens of its path; it may be empty.

    Returns:
        The tree [B, N + added], and which of its nodes are on a row's path, [B, N + added] bool, the root included.
    """
    device = tree.tokens.device
    rows = zip(tree.tokens.tolist(), tree.parents.tolist(), tree.depths.tolist(), chains)
    grown = [_graft(*row) for row in rows]
    size = max(len(tokens) for tokens, _, _, _ in grown)
    for tokens, parents, depths, _ in grown:
        missing = size - len(tokens)
        tokens += [NO_TOKEN] * missing
        parents += [0] * missing
        depths += [1] * missing
    on_path = torch.zeros(len(grown), size, dtype=torch.bool, device=device)
    for b, (_, _, _, path) in enumerate(grown):
        on_path[b, path] = True
    fields = [torch.tensor(columns, device=device) for columns in list(zip(*grown))[:3]]
    log_q = torch.nn.functional.pad(tree.log_q, (0, size - tree.log_q.shape[1]), value=-math.inf)
    return Tree(fields[0], fields[1], fields[2], log_q), on_path


def _graft(
    tokens: list[int], parents: list[int], depths: list[int], chain: Sequence[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """One row of `graft`: tokens, parents and depths with the chain, and the chain's nodes."""
    children = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens)) if node}
    path = [0]
    for token in chain:
        node = children.get((path[-1], token))
        if node is None:
            node = len(tokens)
            tokens, parents, depths = [*tokens, token], [*parents, path[-1]], [*depths, depths[path[-1]] + 1]
        path.append(node)
    return tokens, parents, depths, path


def leaf_paths(tree: Tree, steps: int) -> tuple[Tensor, Tensor]:
    """Paths from below the root to every leaf of trees [R, N], of K = `steps` tokens.

    Returns:
        Tokens [R, L, K], `NO_TOKEN` behind a leaf (a tree with fewer leaves ends in empty paths); and [R, L, K] bool,
        True once for every node: where no earlier path of the tree holds it.
    """
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
