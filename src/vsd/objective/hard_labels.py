"""Hard labels, option `hard` of `vsd` for rule greedy: likelihood of the greedy token in place of cross-entropy to p.

[paper] The M-step maximises the likelihood of the paths.
[ours] At T = 0 the verifier accepts only the greedy token, so it can be the label of a recorded state. The paths of the
E-step keep the label p.

Measured (docs/results.md), 2.5 minutes at T = 0: objectives with hard labels lose 1 % in a wide tree of fixed size and
gain 0.3 to 0.6 % in a tree that leaves unlikely nodes out (p_min): the drafter becomes more confident.
"""

from dataclasses import replace

from vsd.objective.algebra import Term
from vsd.objective.arw import RejectionWeights
from vsd.objective.divergence import negative_log_likelihood


def hard_labels(term: Term) -> Term:
    """The term with the path's own token as its label; ARW then keeps the token's own acceptance."""
    weights = term.weights
    if isinstance(weights, RejectionWeights):
        weights = replace(weights, own=True)
    return replace(term, weights=weights, divergence=negative_log_likelihood)
