"""Training objectives as pure tensor mathematics."""

from vsd.objective.divergence import Divergence, cross_entropy
from vsd.objective.eagle3 import step_weights
from vsd.objective.fused import FusedLoss, HeadTarget, fused_loss

__all__ = ["Divergence", "FusedLoss", "HeadTarget", "cross_entropy", "fused_loss", "step_weights"]
