"""Training: batches, features, and the trainer."""

from vsd.training.batch import Collator, DraftDataset
from vsd.training.config import VSDConfig
from vsd.training.features import FeatureStore
from vsd.training.trainer import VSDTrainer

__all__ = ["Collator", "DraftDataset", "FeatureStore", "VSDConfig", "VSDTrainer"]
