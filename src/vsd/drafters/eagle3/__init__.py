"""EAGLE-3: model and checkpoint formats."""

from vsd.drafters.eagle3.checkpoint import FAMILY
from vsd.drafters.eagle3.model import Eagle3Config, Eagle3Drafter

__all__ = ["FAMILY", "Eagle3Config", "Eagle3Drafter"]
