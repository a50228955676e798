"""Numbers that explain τ: each equals a loop over the results."""

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from vsd.decoding import Result
from vsd.decoding.statistics import acceptance_length, acceptance_per_position
from vsd.evaluation import Prompt, load_prompts, trained_length
from vsd.evaluation.answers import Answers
from vsd.evaluation.breakdown import (
    Passes,
    by_answer,
    by_context,
    by_position,
    by_slice,
    contexts,
    drafted,
    falls_beyond,
    pieces,
    samples,
)
from vsd.targets import Inputs

DEPTH = 4


@st.composite
def results(draw: Any) -> Result:
    """An answer as the engine leaves it: the first token, then passes; the last one may be cut."""
    accepted = draw(st.lists(st.integers(0, DEPTH), max_size=12))
    delivered = [count + 1 for count in accepted]
    if delivered:
        delivered[-1] = draw(st.integers(1, delivered[-1]))
    ids = [draw(st.integers(20, 100)) for _ in range(1 + sum(delivered))]
    return Result(Inputs([5] * draw(st.integers(1, 70))), ids, "stop", accepted, delivered)


@st.composite
def everything(draw: Any) -> tuple[list[Prompt], Answers]:
    """Prompts of one or two turns with some labels, and their answers; at least one has a pass."""
    prompts, answers = [], Answers()
    for n in range(draw(st.integers(1, 6))):
        labels = draw(st.dictionaries(st.sampled_from(["category", "thinking"]), st.sampled_from("ab"), max_size=2))
        turns = draw(st.integers(1, 2))
        prompts.append(Prompt(str(n), draw(st.sampled_from(["mt", "qa"])), None, ["hi"] * turns, labels))
        for turn in range(turns):
            answers.prompts.append(n)
            answers.turns.append(turn)
            answers.results.append(draw(results()))
    answers.results[0] = Result(Inputs([5]), [20, 21, 22], "stop", [1], [2])
    return prompts, answers


@settings(deadline=None, max_examples=30)
@given(everything())
def test_slices_equal_a_loop_over_prompts(given_: tuple[list[Prompt], Answers]) -> None:
    prompts, answers = given_
    found = by_slice(Passes.of(answers), answers, prompts)
    assert "file" in found
    kinds = {"file": lambda p: p.suite, "category": lambda p: p.labels.get("category")}
    kinds["thinking"] = lambda p: p.labels.get("thinking")
    for name, value in kinds.items():
        wanted: dict[str, list[Result]] = {}
        for n, result in zip(answers.prompts, answers.results):
            if value(prompts[n]) is not None:
                wanted.setdefault(value(prompts[n]), []).append(result)
        wanted = {v: rs for v, rs in wanted.items() if any(r.delivered for r in rs)}
        assert found.get(name, {}).keys() == wanted.keys()
        for v, rs in wanted.items():
            slice_ = found[name][v]
            assert slice_["tau"] == pytest.approx(acceptance_length(rs))
            assert slice_["tau_ci"][0] <= slice_["tau"] + 1e-9 and slice_["tau"] <= slice_["tau_ci"][1] + 1e-9
            assert slice_["answers"] == len(rs) and slice_["tokens"] == sum(len(r.tokens) for r in rs)
    json.dumps(found, allow_nan=False)


@settings(deadline=None, max_examples=30)
@given(everything())
def test_contexts_equal_a_loop_over_passes(given_: tuple[list[Prompt], Answers]) -> None:
    _, answers = given_
    tokens: dict[int, list[int]] = {}
    for result in answers.results:
        length = len(result.prompt.ids) + 1  # the prefill decides the first token
        for delivered in result.delivered:
            tokens.setdefault(int(math.log2(length)), []).append(delivered)
            length += delivered
        assert length == len(result.prompt.ids) + len(result.tokens)
    rows = by_context(Passes.of(answers))
    assert [(row["from"], row["to"]) for row in rows] == [(2**k, 2 ** (k + 1)) for k in sorted(tokens)]
    for row, k in zip(rows, sorted(tokens)):
        assert row["passes"] == len(tokens[k]) and row["tau"] == pytest.approx(np.mean(tokens[k]))
    json.dumps(rows, allow_nan=False)


@settings(deadline=None, max_examples=30)
@given(everything())
def test_answers_are_binned_by_their_length(given_: tuple[list[Prompt], Answers]) -> None:
    _, answers = given_
    found: dict[int, list[int]] = {}
    for result in answers.results:
        found.setdefault(int(math.log2(len(result.tokens))), []).extend(result.delivered)
    rows = by_answer(Passes.of(answers))
    assert [row["from"] for row in rows] == [2**k for k in sorted(found) if found[k]]
    for row in rows:
        assert row["tau"] == pytest.approx(np.mean(found[int(math.log2(row["from"]))]))


@settings(deadline=None, max_examples=30)
@given(everything())
def test_intervals_of_positions_hold_their_shares(given_: tuple[list[Prompt], Answers]) -> None:
    _, answers = given_
    intervals = by_position(Passes.of(answers), DEPTH)
    shares = acceptance_per_position(answers.results, DEPTH)
    assert len(intervals) == len(shares) == DEPTH
    assert all(
        0 <= low <= share + 1e-9 and share <= high + 1e-9 <= 1 + 1e-8 for (low, high), share in zip(intervals, shares)
    )


def test_an_interval_is_over_prompts_and_not_over_passes() -> None:
    """Two prompts of 50 passes each, one accepts all and one nothing: the interval spans everything."""
    answers = Answers()
    for n, accepted in enumerate((1, 0)):
        answers.prompts.append(n)
        answers.results.append(
            Result(Inputs([5]), [20] * (51 + 50 * accepted), "stop", [accepted] * 50, [accepted + 1] * 50)
        )
    assert by_position(Passes.of(answers), 1) == [(0.0, 1.0)]
    (row,) = [row for row in by_context(Passes.of(answers)) if row["from"] == 16]
    assert row["tau_ci"] == (1.0, 2.0)


def test_no_pass_has_no_context() -> None:
    answers = Answers([0], [0], [Result(Inputs([5]), [20])])
    passes = Passes.of(answers)
    assert by_context(passes) == [] and by_position(passes, 2) == [(0.0, 0.0)] * 2
    assert by_slice(passes, answers, [Prompt("0", "mt", None, ["hi"])]) == {"file": {}}


# ---- contexts longer than those of training


def row(start: int, tau: float, width: float = 0.1, passes: int = 100) -> dict[str, Any]:
    return {"from": start, "to": 2 * start, "tau": tau, "tau_ci": (tau - width, tau + width), "passes": passes}


def test_tau_falls_where_its_interval_ends_below_shorter_contexts() -> None:
    rows = [row(64, 3.0), row(128, 2.6, passes=300), row(256, 2.65), row(512, 1.2)]  # 2.7 up to 255 tokens
    assert falls_beyond(rows, 256) == [False, False, False, True]
    assert falls_beyond(rows, 200) == [False, False, False, True]
    assert falls_beyond(rows, 512) == [False, False, False, True]
    assert falls_beyond(rows, 1024) == falls_beyond(rows, None) == falls_beyond(rows, 32) == [False] * 4


@pytest.mark.parametrize(
    ("recipe", "window", "length"),
    [
        ({"max_length": 300}, 2048, 300),
        (None, 2048, 2048),
        (None, 4096, None),
        (None, None, None),
        ({"other": 1}, 4096, None),
        ([1], None, None),
    ],
)
def test_the_checkpoint_tells_its_longest_text(
    tmp_path: Path, recipe: Any, window: int | None, length: int | None
) -> None:
    folder = tmp_path / "drafter"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": window} if window else {}))
    if recipe is not None:
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert trained_length(folder, SimpleNamespace(context=4096)) == length
    assert trained_length(tmp_path / "nothing" / "here", SimpleNamespace(context=4096)) is None


# ---- answers to look at


@settings(deadline=None, max_examples=50)
@given(results())
def test_every_token_is_drafted_or_the_targets_own(result: Result) -> None:
    flags = drafted(result)
    wanted = [False]
    for accepted, delivered in zip(result.accepted, result.delivered):
        wanted += ([True] * accepted + [False])[:delivered]
    assert flags == wanted and len(flags) == len(result.tokens)
    assert len(contexts(result)) == len(result.accepted)


@settings(deadline=None, max_examples=50)
@given(results())
def test_pieces_are_the_whole_answer_in_runs(result: Result) -> None:
    tokenizer = tiny_tokenizer()
    found = pieces(result, tokenizer.decode)
    assert "".join(text for text, _ in found) == tokenizer.decode(result.tokens)
    assert all(a[1] != b[1] for a, b in pairwise(found))
    flags = [flag for text, flag in found for _ in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert flags == drafted(result)  # one token a character


def test_a_split_character_belongs_to_the_run_that_completes_it() -> None:
    halves = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"b"}
    decode = lambda ids: b"".join(halves[i] for i in ids).decode(errors="replace")  # noqa: E731
    result = Result(Inputs([5]), [1, 2, 3, 4], "stop", [1, 0], [2, 1])
    result.tokens = [1, 2, 3, 4]
    assert pieces(result, decode) == [("a", False), ("éb", False)]
    assert pieces(Result(Inputs([5]), [1, 2], "length", [1], [1]), decode)[-1] == ("\ufffd", True)


def test_three_short_answers_are_shown() -> None:
    lengths = [200, 90, 33, 10, 40, 31]
    answers = Answers(
        list(range(6)), [0] * 6, [Result(Inputs([5]), [20] * n, "stop", [0] * (n - 1), [1] * (n - 1)) for n in lengths]
    )
    prompts = [Prompt(str(n), "mt", None, [f"question {n}"]) for n in range(6)]
    found = samples(answers, prompts, tiny_tokenizer().decode)
    assert [sample["prompt"] for sample in found] == ["question 1", "question 2", "question 4"]
    assert [len(sample["pieces"][0][0]) for sample in found] == [90, 33, 40]
    few = Answers([3, 5], [0, 0], [answers.results[3], answers.results[5]])
    assert [sample["prompt"] for sample in samples(few, prompts, tiny_tokenizer().decode)] == [
        "question 3",
        "question 5",
    ]


# ---- labels of prompts


def test_prompts_bring_their_labels(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "category": "math", "thinking": True, "language": None, "licence": "MIT"},
        {"turns": ["b"], "source": "dolly", "category": 7, "thinking": False},
        {"prompt": "c", "category": ["x"]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [prompt.labels for prompt in load_prompts([tmp_path / "p.jsonl"])]
    assert found == [
        {"category": "math", "thinking": "true"},
        {"source": "dolly", "category": "7", "thinking": "false"},
        {},
    ]
