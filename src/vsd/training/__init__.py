"""Training: the trainer of E-step and M-step, its data set, and the training job."""

from vsd.training.batch import Collator, DraftDataset
from vsd.training.config import VSDConfig
from vsd.training.trainer import VSDTrainer

__all__ = ["Collator", "DraftDataset", "VSDConfig", "VSDTrainer"]
