"""`benchmarks/lossless.py` goes on where a killed run stopped, and compares every prompt once."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import lossless
from overfit import PROMPTS, fluent_pair
from vsd.decoding import Engine, Sampling
from vsd.errors import ConfigurationError
from vsd.evaluation import Prompt
from vsd.targets import Inputs


def test_prompts_that_a_kill_left_half_are_compared_again(tmp_path: Path) -> None:
    out, request = tmp_path / "out.jsonl", {"batch": 3, "dtype": "float32"}
    lines = [json.dumps(request), *(json.dumps({"tokens": i}) for i in range(7))]
    assert lossless.finished(out, request, 10) == []
    assert out.read_text() == lines[0] + "\n"
    for text in ("\n".join(lines) + "\n", "\n".join(lines) + '\n{"tok', "\n".join(lines)):
        out.write_text(text)
        assert [r["tokens"] for r in lossless.finished(out, request, 10)] == [0, 1, 2, 3, 4, 5]
        assert out.read_text() == "\n".join(lines[:7]) + "\n"
    out.write_text("\n".join(lines) + "\n")
    assert len(lossless.finished(out, request, 7)) == 7  # the last batch is a short one
    with pytest.raises(ConfigurationError, match="other settings"):
        lossless.finished(out, {**request, "dtype": "bfloat16"}, 7)


def test_every_prompt_is_compared_in_its_batch_and_the_first_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = fluent_pair("llama")
    prompts = [Inputs(ids) for ids in PROMPTS]
    found = lossless.report(lossless.compare(target, drafter, prompts, 12))
    assert {name: row["compared"] for name, row in found["decodings"].items()} == {
        "tree, alone": 1,
        "tree, batch": 3,
        "chain, alone": 1,
        "chain, batch": 3,
    }
    assert not any(row["different"] for row in found["decodings"].values())
    generate = lossless.Engine.generate

    def wrong(*given: Any) -> list[Any]:
        return [replace(result, tokens=[*result.tokens[:-1], 0]) for result in generate(*given)]

    monkeypatch.setattr(lossless.Engine, "generate", wrong)
    found = lossless.report(lossless.compare(target, drafter, prompts, 12))
    assert found["decodings"]["tree, batch"]["not_ties"] == 3


def test_pieces_equal_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_target: Any) -> None:
    compared: list[list[int]] = []

    def compare(target: Any, drafter: Any, ids: list[list[int]], length: int) -> list[dict[str, Any]]:
        compared.append([len(each) for each in ids])
        return [{"tokens": len(each)} for each in ids]

    monkeypatch.setattr(lossless, "compare", compare)
    prompts = [Prompt(str(i), "s", None, ["x" * (i + 1)]) for i in range(8)]
    request, out = {"batch": 3, "max_new_tokens": 4}, tmp_path / "out.jsonl"
    assert lossless.measure(tiny_target, None, prompts, request, out, minutes=-1) == []
    out.write_text(json.dumps(request) + "\n" + "".join(json.dumps({"tokens": i}) + "\n" for i in range(4)))
    found = lossless.measure(tiny_target, None, prompts, request, out)
    assert len(found) == 8 and [len(batch) for batch in compared] == [3, 2]
    assert len(out.read_text().splitlines()) == 9


def test_the_reference_is_greedy_whatever_the_model_is_configured_for(monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = fluent_pair("llama")
    prompts = [Inputs(ids) for ids in PROMPTS]
    wanted = [result.tokens for result in Engine(target).generate(prompts, Sampling(12))]
    config = copy.deepcopy(target.model.generation_config)
    config.update(repetition_penalty=1.5, no_repeat_ngram_size=1)
    monkeypatch.setattr(target.model, "generation_config", config)
    assert [answer.tokens for answer in lossless.plain(target, prompts, 12)] == wanted
