"""`vsd tune`: find the fastest draft tree for a machine, a drafter, a set of prompts and a number of requests.

A tree's speed is τ / (seconds of a step). τ comes from batched replay of the drafter on greedy answers. The seconds are
measured on real steps of that many requests decoded together, of a few trees in alternation with plain decoding, so
that a slower phase of the machine affects both and not their ratio. The quotient is a prediction; `vsd bench` measures
the actual speed.

Requests decoded together share a step: it drafts as many levels and verifies as many nodes as the largest of their
trees. A request that ends is replaced by another one, so that every request bears an equal part of each step.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vsd.decoding import Engine, Replay, Result, Sampling
from vsd.decoding.statistics import acceptance_length
from vsd.drafters import Drafter
from vsd.errors import ConfigurationError, VSDError
from vsd.paths import TreeShape
from vsd.progress import track
from vsd.targets import Inputs, Target

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
    *(
        TreeShape(*sizes, p_min, lookup)
        for sizes in ((2, 3, 6), (3, 3, 8), (4, 4, 12))
        for p_min in (0.03, 0.06, 0.12)
        for lookup in (0, 8)
    ),
)
_STEPS = 12  # timed steps of every tree
_TOGETHER = 3  # trees that are timed in alternation with plain decoding: each has caches of its own


@dataclass(frozen=True)
class Tuned:
    """Predicted performance of a tree.

    Attributes:
        seconds: mean seconds of a step (draft, verify, commit) of all requests decoded together.
        speedup: predicted speedup over plain decoding in this engine, over all texts, prefill included.
    """

    shape: TreeShape
    tau: float
    seconds: float
    speedup: float


def tune(
    target: Target,
    drafter: Drafter,
    texts: Sequence[tuple[Inputs, list[int]]],
    shapes: Sequence[TreeShape] = SHAPES,
    progress: bool = True,
    concurrency: int = 1,
) -> list[Tuned]:
    """All trees, the fastest first.

    Args:
        texts: prompts and token ids of greedy answers.
        concurrency: requests decoded together.

    Raises:
        ConfigurationError: a concurrency below 1.
        VSDError: every answer is too short to draft a token.
    """
    if concurrency < 1:
        raise ConfigurationError(f"concurrency is a number of requests, 1 or more, not {concurrency}")
    if not any(len(answer) > 1 for _, answer in texts):
        raise VSDError("every answer ended with its first token: there was nothing to draft")
    shapes = [shape for shape in shapes if shape.top_k <= drafter.vocabulary.size]
    costs = Costs.measure(target, drafter, _typical_context(texts), shapes, concurrency)
    read = sum(len(prompt.ids) for prompt, _ in texts)
    plain = costs.reading[0] * read + costs.plain / concurrency * sum(len(answer) - 1 for _, answer in texts)
    found, replay = [], Replay(target, texts)
    for shape in track(shapes, "trying trees", enabled=progress):
        results = replay(drafter, shape)
        seconds, shares = zip(*shared_steps(costs, shape, [result.trees for result in results], concurrency))
        speedup = plain / (costs.reading[1] * read + float(np.dot(seconds, shares)))
        found.append(Tuned(shape, acceptance_length(results), statistics.mean(seconds), speedup))
    return sorted(found, key=lambda tuned: tuned.speedup, reverse=True)


def shared_steps(
    costs: "Costs", shape: TreeShape, trees: Sequence[Sequence[tuple[int, int]]], concurrency: int
) -> list[tuple[float, float]]:
    """(seconds, share of the requests that the texts fill) of every step of texts decoded together.

    Args:
        trees: for every text, the size (nodes, levels) of each of its trees.
    """
    rows = [[size for text in trees[i::concurrency] for size in text] for i in range(concurrency)]
    steps = []
    for sizes in zip_longest(*rows):
        active = [size for size in sizes if size is not None]
        nodes, levels = map(max, zip(*active))
        steps.append((costs.step(shape, nodes, levels), len(active) / concurrency))
    return steps


def _typical_context(texts: Sequence[tuple[Inputs, list[int]]]) -> Inputs:
    """The inputs half-way through the answer of a text of median length."""
    prompt, answer = sorted(texts, key=lambda text: len(text[0].ids) + len(text[1]))[len(texts) // 2]
    return prompt.followed_by(answer[: len(answer) // 2])


@dataclass(frozen=True)
class Costs:
    """Seconds, medians of real steps of some requests decoded together, at one context.

    Attributes:
        reading: prefill of one prompt token of one request, without and with a drafter.
        plain: a step of plain decoding.
        draft: drafting of a tree to its full depth, by depth and top_k.
        verify: a verification pass, by number of nodes.
        rest: all other work in a step with a drafter.
        one_pass: whether drafting costs the same for every number of levels.
    """

    reading: tuple[float, float]
    plain: float
    draft: dict[tuple[int, int], float]
    verify: dict[int, float]
    rest: float
    one_pass: bool = False

    def step(self, shape: TreeShape, nodes: int, levels: int) -> float:
        """Predicted seconds of a step of `shape` whose tree has `nodes` nodes and `levels` drafted levels."""
        share = bool(levels) if self.one_pass else levels / shape.depth
        draft = self.draft[shape.depth, shape.top_k] * share
        return draft + float(np.interp(nodes, list(self.verify), list(self.verify.values()))) + self.rest

    @classmethod
    @torch.inference_mode()
    def measure(
        cls, target: Target, drafter: Drafter, context: Inputs, shapes: Sequence[TreeShape], concurrency: int = 1
    ) -> "Costs":
        """Time full trees in rounds of a few; seconds are relative to those of plain decoding in the same round."""
        full = list(dict.fromkeys(replace(shape, p_min=0.0, lookup=0) for shape in shapes))
        room = (target.context or sys.maxsize) - len(context.ids)
        sampling = Sampling(min(room, 1 + (_STEPS + 2) * (1 + max(shape.depth for shape in shapes))), eos_ids=())
        rounds = []
        for i in range(0, len(full), _TOGETHER):
            engines = [Engine(target), *(Engine(target, drafter, shape) for shape in full[i : i + _TOGETHER])]
            rounds.append(_timed(engines, context, sampling, concurrency))
        plain = statistics.median(sum(steps[0]) for _, steps in rounds)
        rounds = [(read, _times(plain / sum(steps[0]), steps)) for read, steps in rounds]
        medians = [median for _, steps in rounds for median in steps[1:]]
        verify: dict[int, list[float]] = {1: [steps[0][1] for _, steps in rounds]}
        for shape, (_, verified, _) in sorted(zip(full, medians), key=lambda pair: pair[0].nodes):
            verify.setdefault(shape.nodes, []).append(verified)
        return cls(
            (
                statistics.median(read[0] for read, _ in rounds),
                statistics.median(one for read, _ in rounds for one in read[1:]),
            ),
            plain,
            {(shape.depth, shape.top_k): draft for shape, (draft, _, _) in zip(full, medians)},
            {nodes: statistics.median(seconds) for nodes, seconds in verify.items()},
            statistics.median(rest for _, _, rest in medians),
            drafter.one_pass,
        )


def _timed(
    engines: Sequence[Engine], context: Inputs, sampling: Sampling, concurrency: int
) -> tuple[list[float], list[list[float]]]:
    """Of every engine the seconds to read a token, and the medians of (draft, verify, rest); steps in alternation.

    Raises:
        VSDError: there is no room for a step.
    """
    streams = [engine.stream([Result(context) for _ in range(concurrency)], sampling) for engine in engines]
    read: list[float] = []
    taken: list[list[tuple[float, float, float]]] = [[] for _ in streams]
    for number in range(_STEPS + 2):
        for stream, seconds in zip(streams, taken):
            start = time.perf_counter()
            step = next(stream, None)
            whole = time.perf_counter() - start
            if step is not None and number == 0:
                read.append(whole / len(context.ids) / concurrency)
            elif step is not None and number >= 2:  # the first steps are warm-up
                seconds.append((step.draft, step.verify, whole - step.draft - step.verify))
    if not all(taken):
        raise VSDError("the prompt leaves too little room in the target's context window to time anything")
    return read, [list(map(statistics.median, zip(*seconds))) for seconds in taken]


def _times(factor: float, steps: list[list[float]]) -> list[list[float]]:
    return [[factor * seconds for seconds in step] for step in steps]


def best(found: Sequence[Tuned]) -> Tuned:
    """The tree with the highest τ among those within 2 %, the timing error, of the fastest."""
    fastest = max(tuned.speedup for tuned in found)
    return max((tuned for tuned in found if tuned.speedup > 0.98 * fastest), key=lambda tuned: tuned.tau)


def print_trees(found: Sequence[Tuned], console: Console | None = None, concurrency: int = 1) -> None:
    """Print a table of the eight fastest trees, and the `--tree` of the best one."""
    together = f" for {concurrency} requests at a time" if concurrency > 1 else ""
    title = f"draft trees{together}, the fastest first"
    table = Table("tree", "τ", "ms a step", "expected × plain", title=title)
    for tuned in found[:8]:
        table.add_row(str(tuned.shape), f"{tuned.tau:.2f}", f"{1e3 * tuned.seconds:.1f}", f"{tuned.speedup:.2f}")
    console = console or Console()
    console.print(table)
    console.print(f"--tree {best(found).shape}")
