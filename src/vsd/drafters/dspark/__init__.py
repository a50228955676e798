"""DSpark: model and checkpoint formats."""

from vsd.drafters.dspark.checkpoint import FAMILY
from vsd.drafters.dspark.model import DSparkConfig, DSparkDrafter

__all__ = ["FAMILY", "DSparkConfig", "DSparkDrafter"]
