"""`gto`: group tree optimisation (GTO, Hu et al., arXiv:2509.22134).

Training for the expected accepted length of draft trees. The reward of a tree is the expected number of its tokens that
the target accepts, Σ_nodes Π p along the path (`draft_tree_reward`). At several roots of a sequence, the group, a tree
of the drafter is compared with a tree of a frozen reference drafter. The difference of their rewards, standardised in
the group, is the advantage A of the tree's longest accepted path y:

    L = -min(r A, clip(r, 1 - ε, 1 + ε) A) + λ Σ_k 0.8^k CE(p_k, q_k),   r = exp(mean_t log q(y_t) - log q_ref(y_t))

[paper] Reward, reference, group-standardised advantage, clipped surrogate, an additional token-level loss.
[ours] "Longest" by expected accepted tokens; r a ratio of geometric means; the reference is the drafter at the start of
training; the values of ε and λ. At T = 0 the longest accepted path is a prefix of the recorded text: no target pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vsd.errors import ConfigurationError
from vsd.objective.algebra import Objective, Part, Rule, Term, Weights
from vsd.objective.divergence import cross_entropy, negative_log_likelihood
from vsd.objective.eagle3 import Decay
from vsd.objective.kinds import Contrasted, Recorded
from vsd.objective.rows import PathRows
from vsd.objective.utility import survival
from vsd.paths import TreeShape


def draft_tree_reward(acceptance: Tensor, fresh: Tensor) -> Tensor:
    """Expected accepted tokens of trees, [...], given by the paths from their roots to their leaves.

    Args:
        acceptance: a of every token of every leaf's path, [K, ..., L].
        fresh: True at one path of those that share a node, so that every node counts once, [K, ..., L] bool.
    """
    return (survival(acceptance) * fresh).sum((0, -1))


def standardised(reward: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the last dimension; 0 where all rewards are equal."""
    centred = reward - reward.mean(-1, keepdim=True)
    return centred / reward.std(-1, keepdim=True).clamp(min=1e-4)


@dataclass(frozen=True)
class Clipped(Weights):
    """r / length inside the trust region, 0 where the clipped branch is the smaller one: PPO's gradient."""

    epsilon: float = 0.2
    kinds = (Contrasted,)
    by_acceptance = True

    def __call__(self, rows: PathRows) -> Tensor:
        """Weights [K, C]."""
        assert rows.old_log_q is not None
        known = rows.known
        length = known.sum(0).clamp(min=1)
        change = (rows.label_log_q - rows.old_log_q).masked_fill(~known, 0.0)
        ratio = (change.sum(0) / length).exp()  # [C]
        gains = rows.share[0] > 0
        inside = torch.where(gains, ratio < 1 + self.epsilon, ratio > 1 - self.epsilon)
        return ratio * inside / length * known


def gto(
    rule: Rule = "greedy", tree: str = "5x4x16", anchors: int = 8, epsilon: float = 0.2, likelihood: float = 1.0
) -> Objective:
    """The clipped surrogate on trees of decoding, and cross-entropy to p on the recorded continuation.

    Args:
        rule: verification that the drafter is served with: greedy or target, which verify trees.
        tree: shape of the draft trees, depth x top_k x nodes.
        anchors: roots of a sequence, at least 2: the group.
        epsilon: ε, half width of the trust region of r.
        likelihood: λ, weight of the cross-entropy on the recorded continuation, positive.

    Raises:
        ConfigurationError: the tree is not depth x top_k x nodes, no token-level loss is left, or rule rejection.
    """
    if likelihood <= 0:
        raise ConfigurationError(
            f"likelihood must be positive, not {likelihood}: the surrogate alone makes the drafter forget"
        )
    recorded = Part(Recorded(), (Term(Decay(), cross_entropy, likelihood),))
    trees = Part(Contrasted(TreeShape.parse(tree), anchors), (Term(Clipped(epsilon), negative_log_likelihood),))
    return Objective((recorded, trees), rule)
