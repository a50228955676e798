"""Verification rules: which drafted tokens the target keeps, and with what probability.

All are lossless: at temperature 0 the output is the target's greedy continuation, above it the target's law.
"""

from vsd.verification.rejection import verify_rejection
from vsd.verification.walk import Verdict, follow

__all__ = ["Verdict", "follow", "verify_rejection"]
