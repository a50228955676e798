"""Kinds of paths: the states that a part of an objective is trained on.

Each kind is a frozen dataclass of its settings. The trainer's E-step builds the paths themselves, with one weight (the
share) for every path or token. All paths of one kind together weigh `weight` times the recorded paths of the batch.
"""

from dataclasses import dataclass
from typing import ClassVar

from vsd.errors import ConfigurationError
from vsd.paths import TreeShape


@dataclass(frozen=True)
class PathKind:
    """Base class of all kinds.

    Attributes:
        written: whether the tokens are the target's own, or the drafter's.
    """

    written: ClassVar[bool]

    @property
    def every(self) -> int:
        """Training steps from one E-step of this kind to the next."""
        return 1


@dataclass(frozen=True)
class Recorded(PathKind):
    """The recorded continuation after every drafted position. At T = 0 it is the posterior (`vsd.objective.vsd`).

    Attributes:
        smoothing: α of cut paths (`vsd.objective.cut_paths`), in (0, 1]; None: paths are whole.
        lookup: leave out the states where decoding with lookup copies from the text and does not ask the drafter.

    Raises:
        ConfigurationError: smoothing is outside (0, 1].
    """

    smoothing: float | None = None
    lookup: bool = False
    written = True

    def __post_init__(self) -> None:
        if self.smoothing is not None and not 0 < self.smoothing <= 1:
            raise ConfigurationError(
                f"smoothing must be in (0, 1], not {self.smoothing}: with 0, some steps would never be trained"
            )


@dataclass(frozen=True)
class Continued(PathKind):
    """Alternative continuations, sampled from the target at positions of low target confidence.

    The first token of a path is drawn from p at a position of the text where p of the recorded token is low, all tokens
    at the temperature of serving. Every position along a path is a state to draft from.

    Attributes:
        anchors: paths of a sequence; their positions are drawn with probability ∝ 1 - p(recorded token).
        length: tokens of a path.
        epochs: a sequence keeps its paths for this number of epochs, as far as memory allows.
        weight: of all such paths together, relative to the recorded paths.

    Raises:
        ConfigurationError: a value is out of range.
    """

    anchors: int = 16
    length: int = 16
    epochs: int = 4
    weight: float = 2.0
    written = True

    def __post_init__(self) -> None:
        _require_at_least(1, anchors=self.anchors, epochs=self.epochs)
        _require_at_least(2, length=self.length)
        _require_positive(weight=self.weight)


@dataclass(frozen=True)
class Drafted(PathKind):
    """Paths sampled from the current drafter and scored by the target.

    Attributes:
        samples: S, paths of an anchor.
        anchors: positions of a sequence, drawn uniformly.
        every: training steps from one E-step to the next.
        weight: of all such paths together, relative to the recorded paths.
        tempering: β; the share of a path among those of its anchor is ∝ exp(β U), U its expected accepted tokens.
        temperature: of sampling, relative to the drafter as it is served.

    Raises:
        ConfigurationError: a value is out of range.
    """

    samples: int = 16
    anchors: int = 4
    every: int = 1
    weight: float = 1.0
    tempering: float = 0.0
    temperature: float = 1.0
    written = False

    def __post_init__(self) -> None:
        _require_at_least(1, samples=self.samples, anchors=self.anchors, every=self.every)
        _require_at_least(0, tempering=self.tempering)
        _require_positive(weight=self.weight, temperature=self.temperature)


@dataclass(frozen=True)
class Proposed(PathKind):
    """The draft trees that decoding would propose with the current drafter, scored by the target: every node once.

    Attributes:
        shape: of the trees; with a fixed number of drafted nodes.
        anchors: positions of a sequence, drawn uniformly: the roots of the trees.
        every: training steps from one E-step to the next.
        weight: of all such nodes together, relative to the recorded paths.

    Raises:
        ConfigurationError: a value is out of range, or the shape has p_min or lookup.
    """

    shape: TreeShape = TreeShape(5, 4, 16)
    anchors: int = 4
    every: int = 1
    weight: float = 1.0
    written = False

    def __post_init__(self) -> None:
        _require_at_least(1, anchors=self.anchors, every=self.every)
        _require_positive(weight=self.weight)
        if self.shape.p_min or self.shape.lookup:
            raise ConfigurationError("trees to train on have a fixed number of drafted nodes: no p_min, no lookup")


@dataclass(frozen=True)
class Contrasted(Proposed):
    """The longest accepted path of every such tree; its share is the advantage of the tree over a reference tree.

    The reference drafter is the drafter at the start of training, frozen. Advantages are standardised within a
    sequence, so about half of the shares are negative.

    Raises:
        ConfigurationError: a value is out of range; a single anchor has no advantage.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchors < 2:
            raise ConfigurationError(
                "advantages are standardised among the anchors of a sequence: anchors must be at least 2"
            )


def _require_at_least(least: int, **values: float) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigurationError(f"{name} must be at least {least}, not {value}")


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ConfigurationError(f"{name} must be positive, not {value}")
