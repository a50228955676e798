"""Verification rules: `greedy`, `target` (trees) and `rejection` (sampled chains).

All are lossless: at temperature 0 the output is the target's greedy continuation, above it a sample of the target's
law, both after the logits processors of the request.
"""

from vsd.verification.choice import verify
from vsd.verification.law import Law
from vsd.verification.walk import Verdict, follow, walk

__all__ = ["Law", "Verdict", "follow", "verify", "walk"]
