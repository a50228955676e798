"""DFlash2: model and checkpoint formats."""

from vsd.drafters.dflash2.checkpoint import FAMILY
from vsd.drafters.dflash2.model import DFlash2Config, DFlash2Drafter

__all__ = ["FAMILY", "DFlash2Config", "DFlash2Drafter"]
