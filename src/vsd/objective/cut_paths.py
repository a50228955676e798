"""Cut paths, option `smoothing` of `vsd` and `eagle3`: later steps are trained only where decoding is likely. [ours]

Drafts are likely to be rejected where the target itself is not confident. So a recorded path continues after
token x_k with probability

    ã_k = α + (1 - α) p(x_k)        α = smoothing; p = 0 outside the draft vocabulary

and steps after the cut are not computed. Step t is then trained with probability κ_{t-1} = Π_{k<t} ã_k. With `arw` its
weight is the number of tokens left in the path, whose mean is Σ_{t≤k≤K} κ_{k-1} / κ_{t-1} (tests/exact).

Measured (docs/results.md), 2.5 minutes at T = 0 (`smoothing` 0.05 according to docs/log.md): 151 steps instead of
115, and 0.998 [0.995, 1.001] × `eagle3`. The committed drafter was trained with `eagle3` and `smoothing` 0.3.

Legend: K steps, C paths.
"""

from dataclasses import dataclass

from torch import Tensor

from vsd.objective.algebra import Weights
from vsd.objective.kinds import Recorded
from vsd.objective.rows import PathRows
from vsd.objective.utility import to_go


@dataclass(frozen=True)
class TokensLeft(Weights):
    """ARW of cut paths: the number of tokens from this one to the end of the path."""

    kinds = (Recorded,)

    def __call__(self, rows: PathRows) -> Tensor:
        """Weights [K, C]."""
        return to_go(rows.valid.to(rows.log_q.dtype))
