"""`vsd`: Variational Speculative Decoding (Zou et al., arXiv:2602.05774).

Training for the acceptance of whole draft paths z = (z_1 … z_K). p is the target's distribution of paths, q the
drafter's, κ(z) = Π_t a_t the probability that the verifier accepts z.

[paper] Evidence lower bound, tight at the posterior of valid paths r(z) ∝ p(z) κ(z):

    log Σ_z p(z) κ(z)  ≥  E_q[log κ(z)] - KL(q(z) ‖ p(z))

[paper] EM. E-step: up to 40 paths z_s, filtered by the verifier. M-step, with adaptive rejection weighting ω (ARW) and
confidence-aware regularisation c (CAR):

    L = Σ_s w_s Σ_t ω_{s,t} (-log q_t(z_{s,t})) + λ Σ_t c_t KL(p_t ‖ q_t)

[ours] The formulas of w, ω and c, and this reading, which is the default:

    L = Σ_t 0.8^t CE(p_t, q_t)  on recorded paths  +  share · Σ_t 0.8^t CE(p_t, q_t)  on alternative continuations

- Recorded paths are the E-step at T = 0: a drafted path, cut at its first rejection, is a prefix of the greedy text.
- Alternative continuations of the target are further valid paths (`added_paths.py`).
- The label is p: by losslessness the token that verification emits at a state, accepted or residual, has law p.
  For `rejection` the divergence is the LK hybrid of KL and TV, whose minimum is at p, too.
- 0.8^t in place of ω, and λ = 0, accept more than our ARW and CAR (docs/results.md).

Options in files of their own: `arw.py` (with `accepted_length.py`, `tree_survival.py`), `car.py`, `cut_paths.py`,
`hard_labels.py`.
"""

from vsd.errors import ConfigurationError
from vsd.objective.acceptance import Reached
from vsd.objective.added_paths import EStepPaths, added_paths
from vsd.objective.algebra import Objective, Part, Rule, Term
from vsd.objective.arw import arw as arw_terms
from vsd.objective.car import car as car_terms
from vsd.objective.cut_paths import TokensLeft
from vsd.objective.divergence import cross_entropy
from vsd.objective.eagle3 import Decay
from vsd.objective.hard_labels import hard_labels
from vsd.objective.kinds import Proposed, Recorded
from vsd.objective.lk import ETA, Hybrid


def vsd(
    rule: Rule = "greedy",
    recorded: bool = True,
    e_step: EStepPaths | None = "continued",
    anchors: int | None = None,
    length: int | None = None,
    epochs: int | None = None,
    weight: float | None = None,
    samples: int | None = None,
    every: int | None = None,
    tempering: float | None = None,
    tree: str | None = None,
    arw: bool = False,
    alpha: float | None = None,
    cut: float | None = None,
    width: float = 1.0,
    car: float = 0.0,
    smoothing: float | None = None,
    hard: bool = False,
    lookup: bool = False,
    eta: float = ETA,
) -> Objective:
    """Cross-entropy to p on recorded paths and on alternative continuations of the target.

    Args:
        rule: verification that the drafter is served with: greedy (T = 0), target or rejection (T > 0).
        recorded: train recorded paths, too; a drafter that has memorised its text gains more without them.
        e_step: added paths: continued (by the target), drafted (by the drafter) or trees (of decoding); null: none.
        anchors: positions of a sequence with added paths; null: 16 for continued, else 4.
        length: tokens of a continuation, at least 2; null: 16.
        epochs: a sequence keeps its continuations for this number of epochs; null: 4.
        weight: of all added paths together, relative to the recorded ones; null: 2 for continued, else 0.1.
        samples: drafted paths of an anchor; null: 16; the paper draws up to 40.
        every: training steps between two E-steps, for drafted and trees; null: 4.
        tempering: β, the share of a drafted path is ∝ exp(β · expected accepted tokens); null: 0.5.
        tree: shape of trees, depth x top_k x nodes; null: 5x4x16.
        arw: adaptive rejection weighting in place of 0.8^t.
        alpha: smoothing α of ARW, 0 … 1; null: the current share of rejected first draft tokens.
        cut: cumulative log q, in nats, of a draft tree's least likely node: ARW by tree survival; null: of a chain.
        width: scale in nats of the tree's edge at cut.
        car: λ, scale of the confidence-aware regularisation; 0: none; 0.5 was measured.
        smoothing: α of cut paths, in (0, 1]; null: recorded paths are whole.
        hard: recorded tokens as hard labels in place of p, for rule greedy.
        lookup: leave out recorded states where decoding with lookup does not ask the drafter.
        eta: η of the LK hybrid, for rule rejection: how fast it turns from KL to TV as acceptance rises.

    Raises:
        ConfigurationError: an option that the other options leave without use, or a value out of range.
    """
    _check(rule, recorded, e_step, arw, alpha, cut, width, car, smoothing, hard, lookup, eta)
    chosen = {"anchors": anchors, "length": length, "epochs": epochs, "weight": weight, "samples": samples}
    added = added_paths(e_step, rule, {**chosen, "every": every, "tempering": tempering, "tree": tree})
    terms: tuple[Term, ...] = (Term(Decay(), Hybrid(eta) if rule == "rejection" else cross_entropy),)
    terms = arw_terms(rule, alpha, cut, width, eta) if arw else terms
    text = (Term(TokensLeft(), cross_entropy),) if arw and smoothing is not None else terms
    text = tuple(map(hard_labels, text)) if hard else text
    drawn = (Term(Reached(rule, 0.0), cross_entropy),) if isinstance(added, Proposed) else terms
    parts = [Part(Recorded(smoothing, lookup), (*text, *car_terms(rule, car)))] if recorded else []
    parts += [Part(added, (*drawn, *car_terms(rule, car)))] if added is not None else []
    return Objective(tuple(parts), rule)


def _check(
    rule: Rule,
    recorded: bool,
    e_step: EStepPaths | None,
    arw: bool,
    alpha: float | None,
    cut: float | None,
    width: float,
    car: float,
    smoothing: float | None,
    hard: bool,
    lookup: bool,
    eta: float,
) -> None:
    """Refuse options without use, all reasons in one message."""
    refused = {
        "alpha and cut are options of ARW: they need arw: true": not arw and (alpha is not None or cut is not None),
        "width is the width of a tree's edge: it needs cut": cut is None and width != 1.0,
        "cut is for rules greedy and target, which verify trees, and for whole paths (smoothing: null)": (
            cut is not None and (rule == "rejection" or smoothing is not None)
        ),
        "smoothing is not for rule rejection, whose weights need whole paths": (
            smoothing is not None and rule == "rejection"
        ),
        "smoothing, hard and lookup are options of recorded paths: they need recorded: true": (
            not recorded and (smoothing is not None or hard or lookup)
        ),
        "recorded: false leaves no paths without an E-step: choose an e_step": not recorded and e_step is None,
        f"hard labels are for rule greedy: rule {rule} accepts other tokens than the recorded one": (
            hard and rule != "greedy"
        ),
        f"alpha must be in [0, 1], not {alpha}": alpha is not None and not 0 <= alpha <= 1,
        f"width must be positive and car not negative, not {width} and {car}": width <= 0 or car < 0,
        "eta is an option of rule rejection": rule != "rejection" and eta != ETA,
    }
    if reasons := [reason for reason, applies in refused.items() if applies]:
        raise ConfigurationError("; ".join(reasons))
