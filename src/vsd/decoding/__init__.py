"""The engine: draft, verify, commit."""

from vsd.decoding.engine import Engine, Result, Sampling, Step
from vsd.decoding.generate import speculative
from vsd.decoding.replay import Replay

__all__ = ["Engine", "Replay", "Result", "Sampling", "Step", "speculative"]
