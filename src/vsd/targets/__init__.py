"""The frozen model: embedding and LM head, its passes over packed nodes, its cache."""

from vsd.targets.cache import TreeCache
from vsd.targets.checkpoint import load_target_info
from vsd.targets.decoder import Decoder, Output
from vsd.targets.info import TargetInfo
from vsd.targets.inputs import Inputs, Padded
from vsd.targets.load import EMBEDDED, load_target
from vsd.targets.target import Prefill, Target

__all__ = [
    "EMBEDDED",
    "Decoder",
    "Inputs",
    "Output",
    "Padded",
    "Prefill",
    "Target",
    "TargetInfo",
    "TreeCache",
    "load_target",
    "load_target_info",
]
