"""Acceptance statistics from the engine's results."""

from collections.abc import Sequence

from vsd.decoding.engine import Result


def acceptance_length(results: Sequence[Result]) -> float:
    """τ: new tokens per target forward pass, bonus token included, pooled over all passes of all answers.

    Prefill, its token, and tokens after the end of an answer do not count; plain decoding has τ = 1.
    """
    passes = sum(len(result.delivered) for result in results)
    return sum(sum(result.delivered) for result in results) / passes if passes else float("nan")


def acceptance_per_position(results: Sequence[Result], depth: int) -> list[float]:
    """For position 1 … depth: the share of passes that accepted at least that many drafted tokens."""
    accepted = [count for result in results for count in result.accepted]
    return [sum(a >= k for a in accepted) / len(accepted) if accepted else 0.0 for k in range(1, depth + 1)]
