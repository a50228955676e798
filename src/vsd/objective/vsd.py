"""`vsd`: Variational Speculative Decoding (Zou et al., arXiv:2602.05774): train for the survival of whole paths.

The paper's: drafting as variational inference of the paths the verifier keeps; EM; an E-step that draws up to 40 paths
from an oracle-filtered posterior; an M-step of weighted likelihood with adaptive rejection weighting (ARW) and
confidence-aware regularisation (CAR):

    L = Σ_s w_s Σ_t ω_{s,t} (-log q_t) + λ Σ_t c_t KL(p_t ‖ q_t)

Its formulas for ω, c and the oracle are not public. Ours:

- *The text's own paths, in closed form.* At T = 0 every drawn path, cut at its first rejection, is a prefix of the
  text's own continuation, and a prefix of length k survives with probability Π_{i≤k} q(x_i). So none need be drawn: the
  recorded one is weighed by its exact survival. Above 0 the cut is taken in expectation too: what the verifier leaves
  at a state it has reached, kept token or residual draw, has the law p (that is losslessness), so the label is p and
  the state's weight is the probability of reaching it.
- *The M-step of `rejection` is the gradient of U itself.* With α = Σ_v min(p_v, q_v), U's gradient is
  Σ_states κ_{t-1} Σ_v ∂min(p_v, q_v) (1 + U behind v): on paths z

      Σ_t κ_{t-1} ∂α_t + 1[q(z_t) < p(z_t)] (Σ_{k>t} κ_k) ∂log q(z_t)

  without bias, whether the drafter draws them and a = min(1, p/q), or they are the target's own words and
  a = min(1, q/p) (tests/exact). What is ahead of a token thus weighs its likelihood; the token's own acceptance is LK's
  hybrid of TV and KL (`eta`), as a gradient of α alone vanishes where q has nothing of p. Smoothing and tempering, both
  below, trade some bias for signal.
- *ARW*: ω_t = Σ_{k≥t} κ_k = ∂U/∂log a_t on acceptances smoothed by how often the drafter is rejected now,
  ã = α + (1 - α) a with α = 1 - acceptance: for a weak drafter ω_t is K - t whatever it drafts, a strong one learns
  where survival is decided. Labels are the target's p; then the step's own a_t is divided out: whether one token was a
  good draw must not decide whether its state is learnt. At T = 0 they can be the greedy tokens (`hard`): that makes the
  drafter surer of itself, which suits trees that leave out unlikely nodes. EAGLE-3's 0.8^k, the default, does better.
- *Cut paths* (`smoothing`): the recorded path is cut by chance where the target is unsure, the rest is not computed.
  ω_t is then the number of tokens left in the path, an unbiased estimate of Σ_{k≥t} κ_k / κ_{t-1}.
- *The E-step* (`e_step`) adds states that the text does not have. *Continued*: the target's own roads not taken. The
  posterior of valid paths is r ∝ p κ. Of paths drawn from the drafter few are kept; those drawn from p are valid
  whatever is drafted, and of r only κ is left to weigh them by, which ARW's credit does. As the text holds one draw
  from p already, they begin where it could have gone another way: at roots drawn by 1 - p(x), with a token drawn from
  p without x. *Drafted*, the paper's: S paths drawn from the drafter at an anchor; their shares are ∝ exp(β U).
  *Trees*, for rule target: the tree decoding would propose, each node weighed by the exact probability that
  verification comes there.
- *Tree utility*: EAGLE-2's tree keeps the token of step k if its cumulative log q is among the best N - 1. Then
  κ_k = σ((Σ_{i≤k} log q(x_i) - cut) / width), with `cut` the score that just gets in: credit goes where the tree's
  edge is, not to tokens that are in anyway.
- *CAR*: c_t = max p_t · (probability of reaching step t).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vsd.errors import VSDError
from vsd.objective.algebra import Continued, Drafted, Objective, Part, Proposed, Recorded, Term, Weights, tree_named
from vsd.objective.divergence import cross_entropy, negative_log_likelihood
from vsd.objective.eagle3 import DECAY, Decay
from vsd.objective.lk import Hybrid
from vsd.objective.rows import PathRows
from vsd.objective.utility import credit, reached, smoothed, survival, to_go
from vsd.verification.rejection import acceptance


def path_acceptance(rows: PathRows, rule: str) -> Tensor:
    """a [K, C]: chance that the verifier goes along with the path's token, given that it went along before.

    A token the target has written is its choice, accepted if it was drafted: q(x), or min(1, q/p) by `rejection`
    (drafted and kept, over the p it was written with). A drafted one is accepted as the rule says.
    """
    if rule == "rejection":
        log_p, log_q = rows.label_p.log(), rows.label_log_q
        a = acceptance(log_q, log_p) if rows.written else acceptance(log_p, log_q)
        return a.masked_fill(~rows.known, 0.0)  # p and q of a token that cannot be drafted are both given as 0
    return rows.label_log_q.exp() if rows.written else rows.label_p


def _smoothed(rows: PathRows, rule: str, alpha: float | None) -> Tensor:
    """ã [K, C]; `alpha` None adapts to how often the drafter is rejected now."""
    return smoothed(path_acceptance(rows, rule), 1 - rows.acceptance if alpha is None else alpha)


def tree_survival(log_q: Tensor, cut: float, width: float) -> Tensor:
    """κ [K, C]: probability that the tree holds step k, from log q of the path's tokens."""
    return ((log_q.cumsum(0) - cut) / width).sigmoid()


@dataclass(frozen=True)
class RejectionWeights(Weights):
    """ARW. `alpha` None adapts it; `cut` takes the tree's survival in place of the chain's.

    Attributes:
        own: the label is the token itself, so that its own acceptance counts.
    """

    rule: str = "greedy"
    alpha: float | None = None
    cut: float | None = None
    width: float = 1.0
    own: bool = False

    def __call__(self, rows: PathRows) -> Tensor:
        """[K, C]."""
        if self.cut is not None:
            alpha = 1 - rows.acceptance if self.alpha is None else self.alpha
            kappa = tree_survival(rows.label_log_q.clamp(min=-50), self.cut, self.width)
            edge = credit(4 * kappa * (1 - kappa) * rows.valid)  # ∂κ/∂log q, 1 at the edge
            return alpha * Decay()(rows) + (1 - alpha) * edge * rows.valid
        a = _smoothed(rows, self.rule, self.alpha) * rows.valid
        worth = credit(survival(a))
        return worth if self.own else worth / a.clamp(min=1e-6)


@dataclass(frozen=True)
class Reached(Weights):
    """κ_{t-1} on smoothed acceptances: the chance that verification comes here."""

    rule: str = "rejection"
    alpha: float | None = None

    def __call__(self, rows: PathRows) -> Tensor:
        """[K, C]."""
        return reached(_smoothed(rows, self.rule, self.alpha)) * rows.valid


@dataclass(frozen=True)
class Prospect(Weights):
    """Σ_{k>t} κ_k where q < p: the tokens ahead that a likelier token t brings."""

    rule: str = "rejection"
    alpha: float | None = None
    filters = True

    def __call__(self, rows: PathRows) -> Tensor:
        """[K, C]."""
        kappa = survival(_smoothed(rows, self.rule, self.alpha) * rows.valid)
        wanted = rows.label_log_q < rows.label_p.log()
        return (credit(kappa) - kappa) * (wanted & rows.valid)


@dataclass(frozen=True)
class TokensLeft(Weights):
    """ARW of paths that have been cut: how many tokens each still has, this one included."""

    on = (Recorded,)

    def __call__(self, rows: PathRows) -> Tensor:
        """[K, C]."""
        return to_go(rows.valid.to(rows.log_q.dtype))


@dataclass(frozen=True)
class Confidence(Weights):
    """CAR's c: the target's confidence, where decoding is likely to come."""

    rule: str = "greedy"

    def __call__(self, rows: PathRows) -> Tensor:
        """[K, C]."""
        return rows.p.amax(-1) * reached(_smoothed(rows, self.rule, None)) * rows.valid


def vsd(
    rule: str = "greedy",
    arw: bool = False,
    car: float = 0.0,
    alpha: float | None = None,
    cut: float | None = None,
    width: float = 1.0,
    smoothing: float | None = None,
    eta: float = 3.0,
    hard: bool = False,
    lookup: bool = False,
    recorded: bool = True,
    e_step: str | None = "continued",
    **paths: Any,
) -> Objective:
    """By default the E-step with EAGLE-3's weights, which accepts most (docs/results.md); `arw` and `car` are added.

    Args:
        arw: weigh by `RejectionWeights`, with its options `alpha`, `cut` and `width`; for `rejection` U's own gradient.
        car: scale of the regulariser.
        recorded: train the text's own states, too, to which `smoothing`, `hard` and `lookup` apply; a drafter that
            knows its text by heart gains more without them.
        e_step: "continued", "drafted" or "trees".
        paths: its options, those of `Continued`, of `Drafted`, or of `Proposed` with the shape as `tree`: "5x4x16".

    Raises:
        VSDError: options of ARW without it; tree survival (`cut`) for a rule that verifies chains; paths that are cut
            and weighed by survival; hard labels above temperature 0; options of recorded states without them; an E-step
            that does not exist or teaches nothing under that rule.
        TypeError: an option that the E-step does not have.
    """
    refused = {
        "alpha and cut are options of ARW: they need arw: true": not arw and (alpha is not None or cut is not None),
        "a tree's cut goes with the rules greedy and target, which verify trees, and with whole paths": (
            cut is not None and (rule == "rejection" or smoothing is not None)
        ),
        "rule rejection weighs paths by what the drafter survives: they must be whole (smoothing: null)": (
            smoothing is not None and rule == "rejection"
        ),
        "smoothing, hard and lookup apply to the text's own states: they need recorded: true": (
            not recorded and (smoothing is not None or hard or lookup)
        ),
        "without an E-step (e_step: null) only the text's own states are left: they need recorded: true": (
            not recorded and e_step is None
        ),
        f"hard labels are for rule greedy: by {rule}, p itself is served": hard and rule != "greedy",
    }
    if reasons := [reason for reason, applies in refused.items() if applies]:
        raise VSDError("; ".join(reasons))
    regular = (Term(Confidence(rule), cross_entropy, car),) if car else ()
    weights: Weights = RejectionWeights(rule, alpha, cut, width) if arw else Decay(DECAY)
    whole: Weights = RejectionWeights(rule, alpha, cut, width, own=True) if arw and hard else weights
    if arw and smoothing is not None:
        whole = TokensLeft()
    text: tuple[Term, ...] = (Term(whole, negative_log_likelihood if hard else cross_entropy),)
    drawn: tuple[Term, ...] = (Term(weights, cross_entropy),)
    if rule == "rejection":
        slope = (Term(Reached(rule, alpha), Hybrid(eta)), Term(Prospect(rule, alpha), negative_log_likelihood))
        text = drawn = slope if arw else (Term(weights, Hybrid(eta)),)
    parts = [Part(Recorded(smoothing, lookup), (*text, *regular))] if recorded else []
    extra = _e_step(e_step, rule, paths)
    if isinstance(extra, Proposed):
        drawn = (Term(Reached(rule, 0.0), cross_entropy),)
    if extra is not None:
        parts.append(Part(extra, (*drawn, *regular)))
    return Objective(tuple(parts), rule)


def _e_step(name: str | None, rule: str, options: dict[str, Any]) -> Continued | Drafted | Proposed | None:
    """The paths that are added to the text's own."""
    if name == "continued":
        return Continued(**options)
    if name == "drafted" and rule == "greedy":
        raise VSDError(
            "at temperature 0 drafts that are kept are the text's own: drawing from the drafter adds nothing"
        )
    if name == "drafted":
        return Drafted(**{"every": 4, "weight": 0.1, "tempering": 0.5, **options})
    if name == "trees" and rule != "target":
        raise VSDError(f"the E-step draws trees for rule target, not {rule}: see vsd.objective.algebra.Proposed")
    if name == "trees":
        shape = tree_named(options.pop("tree", "5x4x16"))
        return Proposed(shape, **{"every": 4, "weight": 0.1, **options})
    if name is not None:
        raise VSDError(f"unknown E-step '{name}': choose continued, drafted or trees, or null for none")
    if options:
        raise VSDError(f"without an E-step there is nothing that {', '.join(options)} could mean")
    return None
