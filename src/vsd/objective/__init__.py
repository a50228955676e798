"""Training objectives as pure tensor mathematics: paths × weights × divergence."""

from vsd.objective.algebra import WRITTEN, Continued, Contrasted, Drafted, Objective, Part, Proposed, Recorded, Term
from vsd.objective.fused import FusedLoss, HeadTarget, PathTarget, fused_loss
from vsd.objective.rows import PathRows
from vsd.objective.table import OBJECTIVES, objective

__all__ = [
    "OBJECTIVES",
    "WRITTEN",
    "Continued",
    "Contrasted",
    "Drafted",
    "FusedLoss",
    "HeadTarget",
    "Objective",
    "Part",
    "PathRows",
    "PathTarget",
    "Proposed",
    "Recorded",
    "Term",
    "fused_loss",
    "objective",
]
