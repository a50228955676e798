"""DFlash: model and checkpoint formats."""

from vsd.drafters.dflash.checkpoint import FAMILY
from vsd.drafters.dflash.model import DFlashConfig, DFlashDrafter

__all__ = ["FAMILY", "DFlashConfig", "DFlashDrafter"]
