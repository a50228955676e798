"""The frozen model: load it, capture its features, run it over packed nodes."""

from vsd.targets.cache import TreeCache
from vsd.targets.load import EMBEDDED, load_target
from vsd.targets.target import Target, TargetOutput

__all__ = ["EMBEDDED", "Target", "TargetOutput", "TreeCache", "load_target"]
