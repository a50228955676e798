"""The engine: draft, verify, commit."""

from vsd.decoding.engine import Engine, Result, Step
from vsd.decoding.generate import speculative
from vsd.decoding.replay import Replay
from vsd.decoding.sampling import Sampling

__all__ = ["Engine", "Replay", "Result", "Sampling", "Step", "speculative"]
