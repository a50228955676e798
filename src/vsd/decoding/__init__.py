"""The engine: draft, verify, commit."""

from vsd.decoding.engine import Engine, Result, Sampling, Step
from vsd.decoding.generate import speculative
from vsd.decoding.replay import replay

__all__ = ["Engine", "Result", "Sampling", "Step", "replay", "speculative"]
