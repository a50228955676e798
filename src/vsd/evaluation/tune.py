"""`vsd tune`: the draft tree that is fastest on this machine, with this drafter, on such prompts.

A tree's speed is τ / (seconds of a step). τ comes from replaying the drafter along greedy answers, many at once; the
seconds from real steps of one request, all trees taking turns, so that a machine that slows down slows all. Their
quotient is a prediction; `vsd bench` measures what comes of it.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vsd.decoding import Engine, Replay, Result, Sampling
from vsd.decoding.statistics import acceptance_length
from vsd.drafters import Eagle3Drafter
from vsd.errors import VSDError
from vsd.paths import TreeShape
from vsd.targets import Target

SHAPES = (
    *(TreeShape.chain(depth) for depth in (1, 2, 3, 4)),
    *(
        TreeShape(*sizes)
        for sizes in (
            (2, 2, 4),
            (2, 3, 6),
            (2, 4, 8),
            (3, 2, 6),
            (3, 3, 8),
            (3, 4, 12),
            (4, 3, 8),
            (4, 3, 12),
            (4, 4, 16),
            (5, 4, 16),
            (5, 5, 24),
            (6, 6, 32),
            (7, 10, 60),
        )
    ),
)
_STEPS = 12  # timed, of every tree


@dataclass(frozen=True)
class Tuned:
    """What a tree is expected to do.

    Attributes:
        seconds: median of a step, to draft, verify and commit, one request at a time.
        speedup: expected, over plain decoding in this engine.
    """

    shape: TreeShape
    tau: float
    seconds: float
    speedup: float


def tune(
    target: Target,
    drafter: Eagle3Drafter,
    texts: Sequence[tuple[list[int], list[int]]],
    shapes: Sequence[TreeShape] = SHAPES,
    progress: bool = True,
) -> list[Tuned]:
    """All trees, the fastest first.

    Args:
        texts: (prompt, greedy answer) token ids.

    Raises:
        VSDError: no answer is long enough to draft anything.
    """
    if not any(len(answer) > 1 for _, answer in texts):
        raise VSDError("every answer ended with its first token: there was nothing to draft")
    shapes = [shape for shape in shapes if shape.top_k <= drafter.config.draft_vocab_size]
    middle = sorted((prompt for prompt, _ in texts), key=len)[len(texts) // 2]
    plain, *seconds = _step_seconds(target, drafter, middle, shapes)
    found, replay = [], Replay(target, texts)
    for shape, cost in zip(shapes, track(seconds, "trying trees", disable=not progress)):
        tau = acceptance_length(replay(drafter, shape))
        found.append(Tuned(shape, tau, cost, tau * plain / cost))
    return sorted(found, key=lambda tuned: tuned.speedup, reverse=True)


@torch.inference_mode()
def _step_seconds(
    target: Target, drafter: Eagle3Drafter, prompt: list[int], shapes: Sequence[TreeShape]
) -> list[float]:
    """Seconds of a step of plain decoding, then of every tree."""
    engines = [Engine(target), *(Engine(target, drafter, shape) for shape in shapes)]
    room = target.config.max_position_embeddings - len(prompt)
    sampling = Sampling(min(room, 1 + (_STEPS + 2) * (1 + max(shape.depth for shape in shapes))), eos_ids=())
    streams = [engine.stream([Result(prompt)], sampling) for engine in engines]
    taken: list[list[float]] = [[] for _ in streams]
    for number in range(_STEPS + 2):
        for stream, seconds in zip(streams, taken):
            step = next(stream, None)
            if step is not None and number >= 2:  # the first is the prompt, the second warms up
                seconds.append(step.draft + step.verify + step.commit)
    if not all(taken):
        raise VSDError("the prompt leaves too little room in the target's context window to time anything")
    return [statistics.median(seconds) for seconds in taken]


def best(found: Sequence[Tuned]) -> Tuned:
    """Of the trees that are as fast as the fastest, within what timing can tell (2 %), the one with the highest τ."""
    fastest = max(tuned.speedup for tuned in found)
    return max((tuned for tuned in found if tuned.speedup > 0.98 * fastest), key=lambda tuned: tuned.tau)


def print_trees(found: Sequence[Tuned], console: Console | None = None) -> None:
    """A table of the fastest trees, and the flags of the best."""
    table = Table("depth × top-k, nodes", "τ", "ms a step", "expected × plain", title="draft trees, the fastest first")
    for tuned in found[:8]:
        shape = tuned.shape
        table.add_row(
            f"{shape.depth} × {shape.top_k}, {shape.nodes}",
            f"{tuned.tau:.2f}",
            f"{1e3 * tuned.seconds:.1f}",
            f"{tuned.speedup:.2f}",
        )
    shape = best(found).shape
    console = console or Console()
    console.print(table)
    console.print(f"--depth {shape.depth} --top-k {shape.top_k} --nodes {shape.nodes}")
