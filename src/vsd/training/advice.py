"""What to do about a drafter that further epochs of the same text no longer improve."""

from collections.abc import Sequence

FEW = 4  # measurements of τ that say nothing yet
MANY_EPOCHS = 8.0  # of text, where τ was not measured
VSD = "--objective vsd --objective-options '{recorded: false, anchors: 32, length: 8}'"


def advice(measured: Sequence[float], epochs: float, adds_paths: bool) -> str | None:
    """One line for the end of a training; None while the text still teaches something.

    The text is exhausted if held-out τ has not risen in the last half of its measurements, or, without measurements,
    after `MANY_EPOCHS`. New answers and alternative continuations help then, about equally (docs/results.md,
    "Objectives on a converged drafter").

    Args:
        measured: held-out τ, as often as it was measured.
        epochs: how often the text was read.
        adds_paths: the objective has an E-step, which adds paths to the text.
    """
    if len(measured) > FEW:
        half = len(measured) // 2
        exhausted = max(measured[half:]) <= max(measured[:half])
    else:
        exhausted = epochs >= MANY_EPOCHS
    if not exhausted or adds_paths or epochs < 1:
        return None
    return (
        f"the text was read {epochs:.0f} times, and more epochs will hardly raise τ: continue from this drafter "
        f"with more answers of the target (vsd data regenerate --temperature 1), or with {VSD}"
    )
