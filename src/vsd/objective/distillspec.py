"""`distillspec`: on-policy distillation (DistillSpec, Zhou et al., arXiv:2310.08461).

    L = Σ_t D(p_t, q_t)      on paths sampled from the drafter, all tokens alike

D is forward KL (`fkl`), reverse KL (`rkl`), Jensen-Shannon (`jsd`) or total variation (`tv`).
"""

from typing import Literal

from vsd.errors import ConfigurationError
from vsd.objective.algebra import Objective, Part, Term
from vsd.objective.divergence import Divergence, cross_entropy, jensen_shannon, reverse_kl, total_variation
from vsd.objective.eagle3 import Decay
from vsd.objective.kinds import Drafted

_DIVERGENCES: dict[str, Divergence] = {
    "fkl": cross_entropy,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
    "tv": total_variation,
}


def distillspec(
    divergence: Literal["fkl", "rkl", "jsd", "tv"] = "fkl", samples: int = 16, anchors: int = 4
) -> Objective:
    """A divergence between p and q on paths sampled from the drafter.

    Args:
        divergence: forward KL, reverse KL, Jensen-Shannon or total variation.
        samples: paths of an anchor.
        anchors: positions of a sequence that paths are drawn at.

    Raises:
        ConfigurationError: an unknown divergence; no samples or anchors.
    """
    if divergence not in _DIVERGENCES:
        raise ConfigurationError(f"unknown divergence '{divergence}': choose {', '.join(_DIVERGENCES)}")
    terms = (Term(Decay(1.0), _DIVERGENCES[divergence]),)
    return Objective((Part(Drafted(samples, anchors), terms),), rule="rejection")
