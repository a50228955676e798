"""Draft trees as EAGLE-2 builds them (Li et al., arXiv:2406.16858), and sampled chains.

The root is the token already decided; its children are the drafter's k best. Then repeatedly: run the k best nodes of
the newest level, give each its k best children, put all of them in a pool. The tree is the root and the best N - 1 of
the pool by cumulative log-probability. A child never outranks its parent, so what is kept is connected; nodes come
out sorted, so a parent's index is always below its children's. Nodes too unlikely to pay for their place can be
left out, and drafting ends where the whole beam is: where the drafter is sure it drafts far, where it is not, hardly.

Legend: B batch, N nodes of a tree, k beam width, P pool size, S scratch slots of the drafter's cache.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vsd.drafters import DraftCache, Eagle3Drafter
from vsd.errors import ConfigurationError
from vsd.targets.sampling import Generators, draw, probabilities

NO_TOKEN = -1
Embed = Callable[[Tensor], Tensor]


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


def draw_tree(
    drafter: Eagle3Drafter, embed: Embed, hidden: Tensor, root: Tensor, cache: DraftCache, shape: TreeShape
) -> Tree:
    """Draft a tree below `root` [B] from the drafter's last output, hidden [B, 1, h]."""
    B, k = root.shape[0], shape.top_k
    ids = drafter.draft_ids()
    beam_logp, best = drafter.log_probs(hidden[:, 0]).topk(k)  # [B, k]
    beam = ids[best]
    tokens, scores = [root[:, None], beam], [torch.zeros_like(beam_logp[:, :1]), beam_logp]
    parents, depths = [torch.zeros_like(beam[:, :1]), torch.zeros_like(beam)], [0] + [1] * k
    hidden = hidden.expand(-1, k, -1)
    seen = torch.zeros(B, k, 0, dtype=torch.bool, device=root.device)
    own = torch.eye(k, dtype=torch.bool, device=root.device).expand(B, k, k)
    beam_nodes = torch.arange(1, k + 1, device=root.device).expand(B, k)  # where the beam stands in the pool
    for depth in range(1, shape.depth):
        if shape.p_min and float(beam_logp.max()) < shape.floor:
            break
        seen = torch.cat([seen, own], dim=-1)
        hidden = drafter.expand(hidden, embed(beam), depth, seen, cache)
        child_logp, best = drafter.log_probs(hidden).topk(k)  # [B, k, k]
        child_logp = (beam_logp[..., None] + child_logp).flatten(1)
        children = ids[best].flatten(1)
        tokens.append(children)
        scores.append(child_logp)
        parents.append(beam_nodes.repeat_interleave(k, dim=1))
        depths += [depth + 1] * k**2
        beam_logp, chosen = child_logp.topk(k)
        beam = children.gather(1, chosen)
        beam_nodes = 1 + k + (depth - 1) * k**2 + chosen
        parent = (chosen // k)[..., None]
        hidden = hidden.gather(1, parent.expand(-1, -1, hidden.shape[-1]))
        seen = seen.gather(1, parent.expand(-1, -1, seen.shape[-1]))
    pool = Tree(
        torch.cat(tokens, 1),
        torch.cat(parents, 1),
        torch.tensor(depths, device=root.device).expand(B, -1),
        torch.cat(scores, 1),
    )
    nodes = shape.nodes
    if shape.p_min:
        nodes = min(nodes, int((pool.log_q >= shape.floor).sum(1).max()))
    return _best(pool, nodes)


def _best(pool: Tree, nodes: int) -> Tree:
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


def draw_chain(
    drafter: Eagle3Drafter,
    embed: Embed,
    hidden: Tensor,
    root: Tensor,
    cache: DraftCache,
    shape: TreeShape,
    temperature: Sequence[float],
    generators: Generators,
) -> Chain:
    """Sample one path below `root` [B], row b at temperature[b]; at 0 it is the drafter's best.

    Below an unlikely token (`shape.p_min`) nothing is drafted, but the token itself stays: whether it is verified must
    not depend on what it is.
    """
    B = root.shape[0]
    divisor = torch.tensor([t or 1.0 for t in temperature], device=root.device)[:, None]
    ids = drafter.draft_ids()
    path, distributions, log_q = [root], [], [torch.zeros(B, device=root.device)]
    for step in range(shape.depth):
        if shape.p_min and float(log_q[-1].max()) < shape.floor:
            break
        q = probabilities(drafter.log_probs(hidden[:, 0]) / divisor, generators)  # [B, Vd]
        drawn = draw(q, generators)
        distributions.append(q.log())
        log_q.append(log_q[-1] + distributions[-1].gather(1, drawn[:, None])[:, 0])
        path.append(ids[drawn])
        if step + 1 < shape.depth:
            scratch = torch.ones(B, 1, step + 1, dtype=torch.bool, device=root.device)
            hidden = drafter.expand(hidden, embed(path[-1][:, None]), step + 1, scratch, cache)
    nodes = torch.arange(len(path), device=root.device)
    tree = Tree(
        torch.stack(path, 1),
        (nodes - 1).clamp(min=0).expand(B, -1),
        nodes.expand(B, -1),
        torch.stack(log_q, 1),
    )
    return Chain(tree, torch.stack(distributions, 1), ids)
