"""Verification rules: which drafted tokens the target keeps, and with what probability.

All are lossless: at temperature 0 the output is the target's greedy continuation, above it the target's law, with all
that a request does to the logits.
"""

from vsd.verification.choice import verify
from vsd.verification.law import Law
from vsd.verification.walk import Verdict, follow, walk

__all__ = ["Law", "Verdict", "follow", "verify", "walk"]
