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
from vsd.paths import TreeShape


@dataclass(frozen=True)
class Recorded:
    """The text's own continuation behind every drafted position. It is the target's: at T = 0 it *is* the oracle.

    Attributes:
        smoothing: α, cut the paths where drafts are likely to be rejected, which is where the target itself is unsure:
            behind a token x a path goes on with probability α + (1 - α) p(x), p being 0 outside the draft vocabulary.
            What is cut is not computed. None: never cut.
        lookup: leave out the states where decoding with lookup copies from the text and does not ask the drafter.
    """

    smoothing: float | None = None
    lookup: bool = False
    every: ClassVar[int] = 1
    written: ClassVar[bool] = True

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
    written: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.samples, self.anchors, self.every) < 1:
            raise VSDError(f"samples, anchors and every must be at least 1, not {self}")
        if self.weight <= 0 or self.temperature <= 0 or self.tempering < 0:
            raise VSDError(f"weight and temperature must be positive and tempering not negative, not {self}")


@dataclass(frozen=True)
class Continued:
    """Roads not taken: where the target was unsure, another token of its own, and how it goes on from there.

    Drawn from p, at the temperature of serving; drafted from everywhere along them.

    Attributes:
        anchors: paths drawn from every sequence; where, by the chance that p leaves to other tokens than the text's.
        length: tokens of a path.
        epochs: for so many each text keeps the paths it was given, in each process and as far as there is room.
        weight: of all of them together, where the text's own paths weigh 1.
    """

    anchors: int = 16
    length: int = 16
    epochs: int = 4
    weight: float = 2.0
    every: ClassVar[int] = 1
    written: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.anchors, self.epochs) < 1 or self.length < 2 or self.weight <= 0:
            raise VSDError(f"anchors and epochs must be at least 1, length at least 2 and weight positive, not {self}")


@dataclass(frozen=True)
class Proposed:
    """The trees that decoding would propose, as the drafter is now, scored by the target: every node once.

    Attributes:
        shape: of the trees.
        anchors: roots drawn from every sequence.
        every: they are drawn at every so many steps only.
        weight: of all of them together, where the text's own paths weigh 1.
    """

    shape: TreeShape = TreeShape(5, 4, 16)
    anchors: int = 4
    every: int = 1
    weight: float = 1.0
    written: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.anchors, self.every) < 1 or self.weight <= 0:
            raise VSDError(f"anchors and every must be at least 1 and weight positive, not {self}")
        if self.shape.p_min or self.shape.lookup:
            raise VSDError("trees to train on have a fixed number of drafted nodes: no p_min, no lookup")


def tree_named(text: str) -> TreeShape:
    """Depth x top_k x nodes, as options of objectives give it.

    Raises:
        VSDError: it is something else.
    """
    try:
        return TreeShape.parse(text)
    except ValueError as error:
        raise VSDError(f"tree is depth x top_k x nodes such as 5x4x16, not '{text}'") from error


@dataclass(frozen=True)
class Contrasted(Proposed):
    """The longest accepted path of every such tree, its share how much better the tree is than a frozen drafter's.

    The frozen drafter is the one training began with. Shares are standardised within a sequence: half are negative.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchors < 2:
            raise VSDError("advantages are standardised among the anchors of a sequence: anchors must be at least 2")


WRITTEN = (Recorded, Continued)  # kinds of paths whose tokens are the target's own


class Weights:
    """How much every step of every path counts.

    Attributes:
        on: for which kinds of paths that means something.
        filters: whether drafted tokens count by what the verifier makes of them.
    """

    on: ClassVar[tuple[type, ...]] = (Recorded, Drafted, Continued, Proposed)
    filters: ClassVar[bool] = False

    def __call__(self, rows: PathRows) -> Tensor:
        """[K, C]; 0 where `rows.valid` is not."""
        raise NotImplementedError


@dataclass(frozen=True)
class Term:
    """scale · Σ share · weights · divergence; the share of a path, or a step, is 1 if recorded, else the E-step's."""

    weights: Weights
    divergence: Divergence
    scale: float = 1.0


@dataclass(frozen=True)
class Part:
    """All terms of one kind of paths.

    Raises:
        VSDError: weights that mean nothing on such paths, or likelihood of the drafter's own unfiltered words.
    """

    paths: Recorded | Drafted | Continued | Proposed
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        kind = type(self.paths)
        for term in self.terms:
            name = type(term.weights).__name__
            if not issubclass(kind, term.weights.on):
                raise VSDError(f"weights {name} have no meaning on {kind.__name__.lower()} paths")
            own = kind in WRITTEN
            if not own and not term.weights.filters and term.divergence is negative_log_likelihood:
                raise VSDError(f"{name} × likelihood on drafted paths would teach the drafter to repeat itself")


@dataclass(frozen=True)
class Objective:
    """The sum of its parts, and the verification rule it trains for ("greedy", "target" or "rejection")."""

    parts: tuple[Part, ...]
    rule: str = "greedy"

    @property
    def needs_target(self) -> bool:
        """Whether training asks the target for more than the features of recorded text."""
        return any(not isinstance(part.paths, Recorded) for part in self.parts)

    def __post_init__(self) -> None:
        if self.rule not in ("greedy", "target", "rejection"):
            raise VSDError(f"unknown verification rule '{self.rule}': choose greedy, target or rejection")
        if all(isinstance(part.paths, (Drafted, Proposed)) and part.paths.every > 1 for part in self.parts):
            raise VSDError("an objective on drafted paths alone must draw them at every step: every=1")
        if sum(isinstance(part.paths, Continued) for part in self.parts) > 1:
            raise VSDError("an objective has one kind of continuations at most")
        if self.rule == "greedy" and any(type(part.paths) is Proposed for part in self.parts):
            raise VSDError("at temperature 0 decoding stays on the text: of a tree only recorded tokens are visited")
        if self.rule == "rejection" and any(isinstance(part.paths, Proposed) for part in self.parts):
            raise VSDError("rejection sampling verifies chains drawn from the drafter, not trees: use rule target")
