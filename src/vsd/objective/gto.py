"""`gto`: group tree optimisation (GTO, Hu et al., arXiv:2509.22134): train for what the tree is worth in decoding.

The reward of a draft tree is the expected number of its tokens that the target accepts, Σ_nodes Π p along the path
(`draft_tree_reward`). At some roots of a sequence, its group, trees of the drafter and of a frozen reference are
compared; the difference, standardised in the group, is the advantage A of the tree's longest accepted path y:

    L = -min(r A, clip(r, 1 - ε, 1 + ε) A) + λ Σ_k 0.8^k CE(p_k, q_k),   r = exp(mean_t log q(y_t) - log q_ref(y_t))

The paper's: reward, reference, group-standardised advantage, clipped surrogate, a token-level loss beside it. Ours,
where we know its text only from its abstract: "longest" by expected accepted tokens, a ratio of geometric means, the
reference being the drafter training began with, and the values of ε and λ. At T = 0 a token is accepted or not, the
path is a prefix of the text, and no target pass is needed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vsd.errors import VSDError
from vsd.objective.algebra import Contrasted, Objective, Part, Recorded, Term, Weights, tree_named
from vsd.objective.divergence import cross_entropy, negative_log_likelihood
from vsd.objective.eagle3 import DECAY, Decay
from vsd.objective.rows import PathRows
from vsd.objective.utility import survival


def draft_tree_reward(acceptance: Tensor, fresh: Tensor) -> Tensor:
    """Expected accepted tokens of a tree, [...], from a [K, ..., L] of its leaves' paths.

    fresh [K, ..., L] bool: every node once. A node is reached by one path of tokens, and siblings exclude each other.
    """
    return (survival(acceptance) * fresh).sum((0, -1))


def standardised(reward: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the last dimension; 0 where all are alike."""
    centred = reward - reward.mean(-1, keepdim=True)
    return centred / reward.std(-1, keepdim=True).clamp(min=1e-4)


@dataclass(frozen=True)
class Clipped(Weights):
    """r / length inside the trust region, 0 where the clipped branch is the smaller one."""

    epsilon: float = 0.2
    on = (Contrasted,)
    filters = True

    def __call__(self, rows: PathRows) -> Tensor:
        """[K, C]."""
        assert rows.old_log_q is not None
        known = rows.known
        length = known.sum(0).clamp(min=1)
        change = (rows.label_log_q - rows.old_log_q).masked_fill(~known, 0.0)
        ratio = (change.sum(0) / length).exp()  # [C]
        gains = rows.share[0] > 0
        inside = torch.where(gains, ratio < 1 + self.epsilon, ratio > 1 - self.epsilon)
        return ratio * inside / length * known


def gto(
    rule: str = "greedy", tree: str = "5x4x16", anchors: int = 8, epsilon: float = 0.2, likelihood: float = 1.0
) -> Objective:
    """The whole objective; `likelihood` is λ.

    Raises:
        VSDError: `tree` is not depth x top_k x nodes, or no token-level loss is left.
    """
    if likelihood <= 0:
        raise VSDError(f"likelihood must be positive, not {likelihood}: the surrogate alone forgets how to draft")
    paths = Contrasted(tree_named(tree), anchors)
    text = Part(Recorded(), (Term(Decay(DECAY), cross_entropy, likelihood),))
    return Objective((text, Part(paths, (Term(Clipped(epsilon), negative_log_likelihood),))), rule)
