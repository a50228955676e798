"""Target features for training: computed in process, read from a store on disk, or given by a server."""

from vsd.features.base import Features, FeatureSource, InProcess, Texts, compute_features, stacked
from vsd.features.served import KeepingServer, KeptFeatures, ServedFeatures, TextStore
from vsd.features.server import FeatureServer
from vsd.features.store import FeatureStore, affordable

__all__ = [
    "FeatureServer",
    "FeatureSource",
    "FeatureStore",
    "Features",
    "InProcess",
    "KeepingServer",
    "KeptFeatures",
    "ServedFeatures",
    "TextStore",
    "Texts",
    "affordable",
    "compute_features",
    "stacked",
]
