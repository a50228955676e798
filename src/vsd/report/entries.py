"""Entries of a JSON file of `vsd bench`: decoders that were measured, and an engine that was served beside."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vsd.evaluation.breakdown import falls_beyond
from vsd.evaluation.report import verdict
from vsd.paths import TreeShape


class Estimate(NamedTuple):
    """A measured value and its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{interval}"


class Slice(NamedTuple):
    """τ of a part of the answers."""

    name: str
    tau: Estimate
    answers: int | None = None


class Context(NamedTuple):
    """τ of the passes behind this many tokens, from `start` on.

    Attributes:
        falls: it lies beyond the drafter's training texts, and τ is lower than within, by more than chance.
    """

    name: str
    start: int
    tau: Estimate
    falls: bool


class Together(NamedTuple):
    """Measurements with this number of prompts decoded together; `milliseconds` are of a pass."""

    concurrency: int
    tau: float
    speedup: Estimate
    tokens_per_second: float
    milliseconds: float


class Sample(NamedTuple):
    """A prompt and pieces of its answer: text, and whether the drafter proposed it."""

    prompt: str
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class Measured:
    """A decoder that `vsd bench` measured; the drafter of plain decoding is None.

    Attributes:
        latency: milliseconds of a pass, by kind of work.
        acceptance: share of passes that accepted at least 1, 2, … drafted tokens.
        slices: τ by a field of the prompts, such as their file.
        by_context: τ by number of tokens before the pass.
        by_concurrency: speed by number of prompts decoded together.
        trained_length: longest text in the drafter's training, in tokens; None: unknown.
    """

    drafter: str | None
    temperature: float
    tree: str
    verification: str
    tau: Estimate
    tokens_per_second: float
    speedup: Estimate
    identical: float | None
    latency: dict[str, float]
    acceptance: list[Estimate]
    slices: dict[str, list[Slice]]
    by_context: list[Context]
    by_concurrency: list[Together]
    trained_length: int | None
    samples: list[Sample]


class Side(NamedTuple):
    """What one engine accepted.

    Attributes:
        length: 1 + accepted drafted tokens of a pass.
        acceptance: share of passes that accepted at least 1, 2, … drafted tokens.
    """

    passes: int
    length: Estimate
    acceptance: list[Estimate]
    tokens_per_second: float


class Difference(NamedTuple):
    """An answer that differs, and its first token that does, both from 1; the tokens there, None behind the end.

    Attributes:
        margin: by how much the target's best logit exceeds the second.
        second: the server's token is the target's second.
    """

    prompt: str
    turn: int
    token: int
    here: int | None
    there: int | None
    margin: float
    second: bool


class EngineComparison(NamedTuple):
    """An engine that ran beside this one; `here` is None if only answers were compared.

    Attributes:
        depth: drafted tokens of a chain.
        verdict: whether acceptance differs by more than chance, and from which position on.
    """

    engine: str
    depth: int
    there: Side
    here: Side | None
    verdict: str
    answers: int
    differences: list[Difference]


def measured(run: dict[str, Any]) -> Measured:
    """An entry of `runs`; what old files lack is empty."""
    shares = run.get("acceptance_per_position") or []
    intervals = run.get("acceptance_per_position_ci") or [None] * len(shares)
    fields = run.get("slices") or {"file": {name: {"tau": tau} for name, tau in run.get("tau_by_suite", {}).items()}}
    return Measured(
        drafter=run["drafter"],
        temperature=float(run["temperature"]),
        tree=str(TreeShape(**run["tree"])) if run.get("tree") else "",
        verification=run.get("verification", "auto"),
        tau=_estimate(run["tau"], run.get("tau_ci")),
        tokens_per_second=float(run["tokens_per_second"]),
        speedup=_estimate(run["speedup"], run.get("speedup_ci")),
        identical=run.get("identical"),
        latency={name: float(run["latency"][name]) for name in ("draft", "verify", "commit")},
        acceptance=[_estimate(share, interval) for share, interval in zip(shares, intervals)],
        slices={field: _slices(values.items()) for field, values in fields.items()},
        by_context=_contexts(run.get("by_context") or [], run.get("trained_length")),
        by_concurrency=[_together(one) for one in run.get("by_concurrency") or []],
        trained_length=run.get("trained_length"),
        samples=[
            Sample(one["prompt"], [(piece, bool(accepted)) for piece, accepted in one["pieces"]])
            for one in run.get("samples") or []
        ],
    )


def served(server: dict[str, Any]) -> EngineComparison:
    """The entry `server`."""
    here = server["here"]
    if server["answers"] < 1 or server["depth"] < 1:
        raise ValueError("nothing was drafted or answered")
    return EngineComparison(
        server["engine"],
        int(server["depth"]),
        _side(server["acceptance"], server["depth"]),
        None if here is None else _side(here, server["depth"]),
        "" if here is None else verdict(server),
        int(server["answers"]),
        [_difference(one) for one in server["differences"]],
    )


def _side(side: dict[str, Any], depth: int) -> Side:
    shares = zip(range(depth), side["per_position"], side["per_position_ci"], strict=True)
    return Side(
        int(side["passes"]),
        _estimate(side["length"], side["length_ci"]),
        [_estimate(share, interval) for _, share, interval in shares],
        float(side["tokens_per_second"]),
    )


def _difference(one: dict[str, Any]) -> Difference:
    where = one["prompt"], one["turn"] + 1, one["position"] + 1
    return Difference(*where, one["here"], one["there"], float(one["margin"]), bool(one["second"]))


def _together(at: dict[str, Any]) -> Together:
    speedup = _estimate(at["speedup"], at["speedup_ci"])
    return Together(
        int(at["concurrency"]), float(at["tau"]), speedup, float(at["tokens_per_second"]), float(at["ms_per_pass"])
    )


def _contexts(rows: list[dict[str, Any]], trained: int | None) -> list[Context]:
    return [
        Context(_range(row["from"], row["to"]), int(row["from"]), _estimate(row["tau"], row.get("tau_ci")), falls)
        for row, falls in zip(rows, falls_beyond(rows, trained))
    ]


def _slices(parts: Iterable[tuple[str, dict[str, Any]]]) -> list[Slice]:
    """Parts with a τ: one whose answers ended with their first token has none."""
    return [
        Slice(name, _estimate(part["tau"], part.get("tau_ci")), part.get("answers"))
        for name, part in parts
        if part["tau"] is not None and math.isfinite(part["tau"])
    ]


def _range(start: int, end: int | None) -> str:
    return f"{start}–{end}" if end is not None and math.isfinite(end) else f"{start}+"


def _estimate(value: float, interval: Sequence[float | None] | None) -> Estimate:
    """A finite value; an interval that is not known is left out."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is no measurement")
    low, high = interval or (None, None)
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return Estimate(float(value), low, high) if known else Estimate(float(value))
