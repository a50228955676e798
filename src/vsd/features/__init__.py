"""Target features for training: computed in process, or read from a store on disk."""

from vsd.features.base import Features, FeatureSource, InProcess, Texts, compute_features, stacked
from vsd.features.store import FeatureStore, affordable

__all__ = [
    "FeatureSource",
    "FeatureStore",
    "Features",
    "InProcess",
    "Texts",
    "affordable",
    "compute_features",
    "stacked",
]
