"""Train, measure and serve the draft models of speculative decoding."""

__version__ = "0.1.0"
