"""`distillspec`: on-policy distillation (DistillSpec, Zhou et al., arXiv:2310.08461).

    L = Σ_t D(p_t, q_t)      on paths drawn from the drafter, every token alike

D is forward KL ("fkl"), reverse KL ("rkl"), Jensen-Shannon ("jsd") or total variation ("tv").
"""

from vsd.errors import VSDError
from vsd.objective.algebra import Drafted, Objective, Part, Term
from vsd.objective.divergence import Divergence, cross_entropy, jensen_shannon, reverse_kl, total_variation
from vsd.objective.eagle3 import Decay

_DIVERGENCES: dict[str, Divergence] = {
    "fkl": cross_entropy,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
    "tv": total_variation,
}


def distillspec(divergence: str = "fkl", samples: int = 16, anchors: int = 4) -> Objective:
    """The whole objective.

    Raises:
        VSDError: an unknown divergence.
    """
    if divergence not in _DIVERGENCES:
        raise VSDError(f"unknown divergence '{divergence}': choose {', '.join(_DIVERGENCES)}")
    paths = Drafted(samples, anchors)
    return Objective((Part(paths, (Term(Decay(1.0), _DIVERGENCES[divergence]),)),), rule="rejection")
