"""Paired bootstrap over prompts (Efron & Tibshirani, ch. 16): both systems are resampled on the same prompts.

Legend: n prompts, R resamples. A rate is Σ tokens / Σ cost over prompts; the cost is seconds or target passes.
"""

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000

Counts = npt.NDArray[np.float64]  # one number for each prompt, [n]


def pooled_rate(tokens: Counts, cost: Counts) -> float:
    """Σ tokens / Σ cost: tokens per second or per target pass, pooled over prompts."""
    return float(tokens.sum() / cost.sum())


def rate_interval(tokens: Counts, cost: Counts, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (low, high) of a pooled rate."""
    picks = _resamples(len(tokens), seed)
    return _percentiles(_rates(tokens, cost, picks), level)


def ratio_interval(
    tokens: Counts,
    cost: Counts,
    base_tokens: Counts,
    base_cost: Counts,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval (low, high) of the ratio of two pooled rates over the same prompts."""
    mine, base = _paired(tokens, cost, base_tokens, base_cost, seed)
    return _percentiles(mine / base, level)


def difference_interval(
    tokens: Counts,
    cost: Counts,
    base_tokens: Counts,
    base_cost: Counts,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval (low, high) of the difference of two pooled rates over the same prompts."""
    mine, base = _paired(tokens, cost, base_tokens, base_cost, seed)
    return _percentiles(mine - base, level)


def _paired(tokens: Counts, cost: Counts, base_tokens: Counts, base_cost: Counts, seed: int) -> tuple[Counts, Counts]:
    """Two pooled rates in every resample of the prompts that both share."""
    picks = _resamples(len(tokens), seed)
    return _rates(tokens, cost, picks), _rates(base_tokens, base_cost, picks)


def _rates(tokens: Counts, cost: Counts, picks: npt.NDArray[np.int64]) -> Counts:
    """The pooled rate of every resample, [R]; NaN if all prompts of a resample have cost 0 (answers of one token)."""
    with np.errstate(invalid="ignore"):
        rates: Counts = tokens[picks].sum(1) / cost[picks].sum(1)
        return rates


def _resamples(n: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices of the prompts of every resample, [R, n]."""
    return np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))


def _percentiles(values: Counts, level: float) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
