"""The frozen model: load it, capture its features, run it over packed nodes."""

from vsd.targets.cache import TreeCache
from vsd.targets.lexicon import Lexicon, load_lexicon
from vsd.targets.load import EMBEDDED, load_target
from vsd.targets.target import Target, TargetOutput

__all__ = ["EMBEDDED", "Lexicon", "Target", "TargetOutput", "TreeCache", "load_lexicon", "load_target"]
