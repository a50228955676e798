"""Where τ comes from: by slice of the prompts, drafted position, context and answer length, and answers to look at.

Every number is a mean over verification passes; intervals are 95 % bootstrap intervals over prompts. Only prompts that
have a pass in a slice are resampled for its interval.

Legend: P verification passes of all answers.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vsd.data.pictures import text_of
from vsd.decoding import Result
from vsd.evaluation.answers import Answers, totals
from vsd.evaluation.bootstrap import pooled_rate, rate_interval
from vsd.evaluation.prompts import Prompt, has_images

_SAMPLES = 3  # answers to look at
_SHORT = 32  # tokens; shorter answers show little

Numbers = npt.NDArray[np.int64]


class Passes(NamedTuple):
    """The verification passes of all answers, each field [P].

    Attributes:
        prompt: number of the prompt.
        context: tokens of prompt and answer before the pass, the root included.
        answer: tokens of the whole answer.
        accepted: drafted tokens that the pass accepted.
        delivered: tokens that it added to the answer.
    """

    prompt: Numbers
    context: Numbers
    answer: Numbers
    accepted: Numbers
    delivered: Numbers

    @classmethod
    def of(cls, answers: Answers) -> "Passes":
        """The passes of all answers, in their order."""
        rows = [
            (prompt, context, len(result.tokens), accepted, delivered)
            for prompt, result in zip(answers.prompts, answers.results)
            for context, accepted, delivered in zip(contexts(result), result.accepted, result.delivered)
        ]
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 5).T)

    def only(self, which: npt.NDArray[np.bool_]) -> "Passes":
        """The passes of a mask [P]."""
        return Passes(*(field[which] for field in self))

    def mean(self, values: npt.NDArray[Any]) -> tuple[float, tuple[float, float]]:
        """The mean of one value for each pass [P], and its interval."""
        total, count = totals(self.prompt, values), totals(self.prompt, np.ones(len(values)))
        used = count > 0
        return pooled_rate(total, count), rate_interval(total[used], count[used])

    def tau(self) -> dict[str, Any]:
        """τ and its interval, by name."""
        tau, interval = self.mean(self.delivered)
        return {"tau": tau, "tau_ci": interval}


def contexts(result: Result) -> list[int]:
    """For every pass, the tokens of prompt and answer that were decided before it."""
    first = len(result.prompt.ids) + len(result.tokens) - sum(result.delivered)  # the prefill's token included
    before = np.cumsum([0, *result.delivered])[:-1]
    return [first + int(count) for count in before]


def by_position(passes: Passes, depth: int) -> list[tuple[float, float]]:
    """Intervals of the shares of passes that accepted at least 1, 2, …, `depth` drafted tokens."""
    if not len(passes.prompt):
        return [(0.0, 0.0)] * depth
    return [passes.mean(passes.accepted >= k)[1] for k in range(1, depth + 1)]


def by_slice(passes: Passes, answers: Answers, prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
    """τ of the prompts of each file and of each value of their labels, and with images and without, where some have
    images; values without a pass are left out."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.labels)
    values: dict[str, list[str | None]] = {"file": [p.suite for p in prompts]}
    if any(seen := [has_images(p) for p in prompts]):
        values["images"] = ["with" if images else "without" for images in seen]
    values |= {name: [p.labels.get(name) for p in prompts] for name in names}
    return {name: _split(passes, answers, given) for name, given in values.items()}


def _split(passes: Passes, answers: Answers, values: Sequence[str | None]) -> dict[str, Any]:
    """τ by value, given the value of every prompt."""
    slices = {}
    for value in dict.fromkeys(v for v in values if v is not None):
        mine = np.array([v == value for v in values])
        part = passes.only(mine[passes.prompt])
        if len(part.prompt):
            results = [result for prompt, result in zip(answers.prompts, answers.results) if mine[prompt]]
            sizes = {"answers": len(results), "tokens": sum(len(result.tokens) for result in results)}
            slices[value] = {**part.tau(), **sizes}
    return slices


def by_context(passes: Passes) -> list[dict[str, Any]]:
    """τ by context length, from ≤ length < to, in powers of two."""
    return _in_powers(passes, passes.context)


def by_answer(passes: Passes) -> list[dict[str, Any]]:
    """τ by the length of the whole answer, from ≤ length < to, in powers of two."""
    return _in_powers(passes, passes.answer)


def _in_powers(passes: Passes, lengths: Numbers) -> list[dict[str, Any]]:
    """τ by a length of every pass [P]."""
    power = np.frexp(lengths)[1] - 1  # floor of log2, exact
    rows = []
    for k in np.unique(power).tolist():
        part = passes.only(power == k)
        rows.append({"from": 2**k, "to": 2 ** (k + 1), **part.tau(), "passes": len(part.prompt)})
    return rows


def falls_beyond(rows: Sequence[Mapping[str, Any]], trained: int | None) -> list[bool]:
    """For each row of `by_context`: whether it lies beyond `trained` tokens and its τ below that of shorter contexts.

    Below: the row's interval ends below the τ of all passes within the trained length.
    """
    within = [row for row in rows if trained is not None and row["from"] < trained]
    if trained is None or not within:
        return [False] * len(rows)
    tau = sum(row["tau"] * row["passes"] for row in within) / sum(row["passes"] for row in within)
    return [row["from"] >= trained and row["tau_ci"][1] < tau for row in rows]


def samples(answers: Answers, prompts: Sequence[Prompt], decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """At most three short answers, with the question, as runs of text: drafted and accepted, or the target's own."""
    found = sorted(
        zip(answers.prompts, answers.turns, answers.results), key=lambda found: (_unfit(found[2]), found[:2])
    )
    return [
        {"prompt": text_of(prompts[prompt].turns[turn]), "pieces": pieces(result, decode)}
        for prompt, turn, result in sorted(found[:_SAMPLES], key=lambda found: found[:2])
    ]


def _unfit(result: Result) -> tuple[bool, int]:
    """Sort key: the shortest answers of at least `_SHORT` tokens first, then the longest of the others."""
    return len(result.tokens) < _SHORT, abs(len(result.tokens) - _SHORT)


def drafted(result: Result) -> list[bool]:
    """For every token of an answer: drafted and accepted, or the target's own, as the first token is."""
    flags = [False] * (len(result.tokens) - sum(result.delivered))
    for accepted, delivered in zip(result.accepted, result.delivered):
        flags += [k < accepted for k in range(delivered)]
    return flags


def pieces(result: Result, decode: Callable[[list[int]], str]) -> list[tuple[str, bool]]:
    """The text of an answer in runs (text, drafted and accepted).

    A character that spans two runs is part of the second one.
    """
    runs, shown, end = [], 0, 0
    for flag, tokens in groupby(drafted(result)):
        end += len(list(tokens))
        text = decode(result.tokens[:end])
        if (end == len(result.tokens) or not text.endswith("\ufffd")) and len(text) > shown:
            runs.append((text[shown:], flag))
            shown = len(text)
    return runs
