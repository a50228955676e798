"""EAGLE-3: model, state and checkpoint formats."""

from vsd.drafters.eagle3.checkpoint import FAMILY
from vsd.drafters.eagle3.model import Eagle3Config, Eagle3Drafter
from vsd.drafters.eagle3.state import Eagle3State

__all__ = ["FAMILY", "Eagle3Config", "Eagle3Drafter", "Eagle3State"]
