"""Paired bootstrap over prompts (Efron & Tibshirani, ch. 16): both systems are resampled on the same prompts."""

import numpy as np

RESAMPLES = 2000


def pooled_rate(tokens: np.ndarray, cost: np.ndarray) -> float:
    """Σ tokens / Σ cost: tokens per second or per pass, pooled over prompts."""
    return float(tokens.sum() / cost.sum())


def rate_interval(tokens: np.ndarray, cost: np.ndarray, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a pooled rate."""
    picks = _resamples(len(tokens), seed)
    return _percentiles(tokens[picks].sum(1) / cost[picks].sum(1), level)


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
    rate = tokens[picks].sum(1) / cost[picks].sum(1)
    base = base_tokens[picks].sum(1) / base_cost[picks].sum(1)
    return _percentiles(rate / base, level)


def _resamples(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
