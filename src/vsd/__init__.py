"""Train, measure and serve the draft models of speculative decoding."""

__version__ = "0.2.0"
