"""Every objective is *paths × weights × divergence*: the trained states, the weight of each, and the loss at each.

A `Term` weighs a divergence; a `Part` holds the terms of one kind of paths; an `Objective` is the sum of its parts.
Meaningless combinations are refused at construction, with the reason.

Legend: K steps, C paths.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from vsd.errors import ConfigurationError
from vsd.objective.divergence import Divergence, negative_log_likelihood
from vsd.objective.kinds import Continued, PathKind, Proposed, Recorded
from vsd.objective.rows import PathRows

Rule = Literal["greedy", "target", "rejection"]


class Weights:
    """The weight of every step of every path.

    Attributes:
        kinds: the kinds of paths for which these weights are defined.
        by_acceptance: whether the weight of a drafted token depends on its acceptance by the verifier.
    """

    kinds: ClassVar[tuple[type[PathKind], ...]] = (PathKind,)
    by_acceptance: ClassVar[bool] = False

    def __call__(self, rows: PathRows) -> Tensor:
        """Weights [K, C]; 0 where a step is not valid."""
        raise NotImplementedError


@dataclass(frozen=True)
class Term:
    """scale · Σ share · weights · divergence over all steps; shares are the E-step's, 1 for recorded paths."""

    weights: Weights
    divergence: Divergence
    scale: float = 1.0


@dataclass(frozen=True)
class Part:
    """All terms of one kind of paths.

    Raises:
        ConfigurationError: weights that are not defined on such paths; plain likelihood of drafted tokens, accepted or
            not, which would make the drafter imitate itself.
    """

    paths: PathKind
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        for term in self.terms:
            self._check(term)

    def _check(self, term: Term) -> None:
        weights, kind = type(term.weights).__name__, type(self.paths).__name__.lower()
        if not isinstance(self.paths, term.weights.kinds):
            raise ConfigurationError(f"weights {weights} are not defined on {kind} paths")
        likelihood = term.divergence is negative_log_likelihood
        if likelihood and not (self.paths.written or term.weights.by_acceptance):
            raise ConfigurationError(
                f"{weights} × likelihood on {kind} paths would make the drafter imitate itself: "
                "weigh drafted tokens by their acceptance"
            )


@dataclass(frozen=True)
class Objective:
    """The sum of its parts, and the verification rule that the drafter is trained for.

    Raises:
        ConfigurationError: an unknown rule; parts that the trainer or the rule does not admit.
    """

    parts: tuple[Part, ...]
    rule: Rule = "greedy"

    @property
    def needs_target(self) -> bool:
        """Whether training asks the target for more than the features of texts and their continuations."""
        return any(not isinstance(part.paths, Recorded | Continued) for part in self.parts)

    @property
    def continues(self) -> bool:
        """Whether the target continues texts in training, which a server can do as well."""
        return any(isinstance(part.paths, Continued) for part in self.parts)

    def __post_init__(self) -> None:
        kinds = [part.paths for part in self.parts]
        trees = [kind for kind in kinds if isinstance(kind, Proposed)]
        if self.rule not in get_args(Rule):
            raise ConfigurationError(f"unknown verification rule '{self.rule}': choose {', '.join(get_args(Rule))}")
        if all(kind.every > 1 for kind in kinds):
            raise ConfigurationError("an objective on drafted paths alone needs an E-step at every step: every=1")
        if sum(isinstance(kind, Continued) for kind in kinds) > 1:
            raise ConfigurationError("an objective has at most one part on alternative continuations")
        if self.rule == "greedy" and any(type(kind) is Proposed for kind in trees):
            raise ConfigurationError(
                "at temperature 0 decoding visits only the recorded tokens of a tree: use rule target"
            )
        if self.rule == "rejection" and trees:
            raise ConfigurationError("rejection sampling verifies sampled chains, not trees: use rule target")
