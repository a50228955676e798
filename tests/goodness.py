"""Goodness of fit of counts to an exact law."""

from scipy import stats
from torch import Tensor


def p_value(counts: Tensor, law: Tensor, least: float = 5.0) -> float:
    """Pearson's χ²: counts [cells] of n draws against probabilities [cells]; rare cells are pooled.

    Cells expected fewer than `least` times form one cell. A draw where the law has no mass gives 0.
    """
    assert abs(float(law.sum()) - 1) < 1e-4
    if counts[law == 0].any():
        return 0.0
    expected = law.double() / law.double().sum() * counts.sum()
    common = expected >= least
    observed, wanted = counts[common].tolist(), expected[common].tolist()
    if float(expected[~common].sum()) > 0:
        observed.append(float(counts[~common].sum()))
        wanted.append(float(expected[~common].sum()))
    if wanted[-1] < least and len(wanted) > 1:  # the pool itself is rare: join it to the cell before
        last, lost = wanted.pop(), observed.pop()
        wanted[-1] += last
        observed[-1] += lost
    return 1.0 if len(wanted) == 1 else float(stats.chisquare(observed, wanted).pvalue)
