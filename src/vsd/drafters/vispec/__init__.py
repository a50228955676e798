"""ViSpec: model and checkpoint format."""

from vsd.drafters.vispec.family import FAMILY
from vsd.drafters.vispec.model import ViSpecConfig, ViSpecDrafter

__all__ = ["FAMILY", "ViSpecConfig", "ViSpecDrafter"]
