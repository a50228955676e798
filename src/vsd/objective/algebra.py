"""Every objective is *paths × weights × divergence*: which states are trained, how much each counts, towards what.

A `Term` weighs a divergence; a `Part` gathers the terms of one kind of paths; an `Objective` adds up its parts.
Combinations that would train on nonsense are refused when they are put together, with the reason.

Legend: K steps, C paths.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vsd.errors import VSDError
from vsd.objective.divergence import Divergence, negative_log_likelihood
from vsd.objective.rows import PathRows


@dataclass(frozen=True)
class Recorded:
    """The text's own continuation behind every drafted position. It is the target's: at T = 0 it *is* the oracle.

    Attributes:
        smoothing: α, cut the paths where drafts are likely to be rejected, which is where the target itself is unsure:
            behind a token x a path goes on with probability α + (1 - α) p(x), p being 0 outside the draft vocabulary.
            What is cut is not computed. None: never cut.
    """

    smoothing: float | None = None

    def __post_init__(self) -> None:
        if self.smoothing is not None and not 0 < self.smoothing <= 1:
            raise VSDError(
                f"smoothing must be in (0, 1], not {self.smoothing}: with 0, some steps would never be learnt"
            )


@dataclass(frozen=True)
class Drafted:
    """Paths the drafter draws as it is now, scored by the target.

    Attributes:
        samples: S, paths of an anchor.
        anchors: roots drawn from every sequence.
        every: they are drawn at every so many steps only.
        weight: of all of them together, where the text's own paths weigh 1.
        tempering: β, a path's share among those of its anchor is ∝ exp(β U), U its expected accepted tokens.
        temperature: at which the drafter is sampled.
    """

    samples: int = 16
    anchors: int = 4
    every: int = 1
    weight: float = 1.0
    tempering: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if min(self.samples, self.anchors, self.every) < 1:
            raise VSDError(f"samples, anchors and every must be at least 1, not {self}")
        if self.weight <= 0 or self.temperature <= 0 or self.tempering < 0:
            raise VSDError(f"weight and temperature must be positive and tempering not negative, not {self}")


class Weights:
    """How much every step of every path counts.

    Attributes:
        on: for which kinds of paths that means something.
        filters: whether drafted tokens count by what the verifier makes of them.
    """

    on: ClassVar[tuple[type, ...]] = (Recorded, Drafted)
    filters: ClassVar[bool] = False

    def __call__(self, rows: PathRows) -> Tensor:
        """[K, C]; 0 where `rows.valid` is not."""
        raise NotImplementedError


@dataclass(frozen=True)
class Term:
    """scale · Σ share · weights · divergence; a path's share is 1 if it is recorded, else the E-step's."""

    weights: Weights
    divergence: Divergence
    scale: float = 1.0


@dataclass(frozen=True)
class Part:
    """All terms of one kind of paths.

    Raises:
        VSDError: weights that mean nothing on such paths, or likelihood of the drafter's own unfiltered words.
    """

    paths: Recorded | Drafted
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        kind = type(self.paths)
        for term in self.terms:
            name = type(term.weights).__name__
            if kind not in term.weights.on:
                raise VSDError(f"weights {name} have no meaning on {kind.__name__.lower()} paths")
            if kind is Drafted and not term.weights.filters and term.divergence is negative_log_likelihood:
                raise VSDError(f"{name} × likelihood on drafted paths would teach the drafter to repeat itself")


@dataclass(frozen=True)
class Objective:
    """The sum of its parts, and the verification rule it trains for ("greedy", "target" or "rejection")."""

    parts: tuple[Part, ...]
    rule: str = "greedy"

    def __post_init__(self) -> None:
        if self.rule not in ("greedy", "target", "rejection"):
            raise VSDError(f"unknown verification rule '{self.rule}': choose greedy, target or rejection")
        if all(isinstance(part.paths, Drafted) and part.paths.every > 1 for part in self.parts):
            raise VSDError("an objective on drafted paths alone must draw them at every step: every=1")
