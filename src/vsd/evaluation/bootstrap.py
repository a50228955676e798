"""Paired bootstrap over prompts (Efron & Tibshirani, ch. 16): both systems are resampled on the same prompts."""

import numpy as np

RESAMPLES = 2000


def pooled_rate(tokens: np.ndarray, cost: np.ndarray) -> float:
    """Σ tokens / Σ cost: tokens per second or per pass, pooled over prompts."""
    return float(tokens.sum() / cost.sum())


def rate_interval(tokens: np.ndarray, cost: np.ndarray, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a pooled rate."""
    picks = _resamples(len(tokens), seed)
    return _percentiles(_rates(tokens, cost, picks), level)


def ratio_interval(
    tokens: np.ndarray,
    cost: np.ndarray,
    base_tokens: np.ndarray,
    base_cost: np.ndarray,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the ratio of two pooled rates over the same prompts."""
    picks = _resamples(len(tokens), seed)
    return _percentiles(_rates(tokens, cost, picks) / _rates(base_tokens, base_cost, picks), level)


def _rates(tokens: np.ndarray, cost: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """The pooled rate of every resample; NaN where all prompts picked cost nothing (answers of one token)."""
    with np.errstate(invalid="ignore"):
        return tokens[picks].sum(1) / cost[picks].sum(1)


def _resamples(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
