"""P-EAGLE: model and checkpoint formats."""

from vsd.drafters.peagle.checkpoint import FAMILY
from vsd.drafters.peagle.model import PeagleConfig, PeagleDrafter

__all__ = ["FAMILY", "PeagleConfig", "PeagleDrafter"]
