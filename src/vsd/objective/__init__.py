"""Training objectives as pure tensor mathematics: paths × weights × divergence."""

from vsd.objective.algebra import Objective, Part, Rule, Term, Weights
from vsd.objective.confidence import Confidence
from vsd.objective.fused import FusedLoss, HeadTarget, PathTarget, fused_loss
from vsd.objective.kinds import Continued, Contrasted, Drafted, PathKind, Proposed, Recorded
from vsd.objective.rows import PathRows
from vsd.objective.table import OBJECTIVES, objective

__all__ = [
    "OBJECTIVES",
    "Confidence",
    "Continued",
    "Contrasted",
    "Drafted",
    "FusedLoss",
    "HeadTarget",
    "Objective",
    "Part",
    "PathKind",
    "PathRows",
    "PathTarget",
    "Proposed",
    "Recorded",
    "Rule",
    "Term",
    "Weights",
    "fused_loss",
    "objective",
]
