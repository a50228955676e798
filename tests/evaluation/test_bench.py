"""Measurement: intervals that cover, prompts as they are, and a report that says what was measured."""

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import tiny_run
from vsd.decoding import Engine, Sampling
from vsd.errors import VSDError
from vsd.evaluation import Contender, Prompt, bench, load_prompts, print_details, print_table, write_json
from vsd.evaluation.bootstrap import pooled_rate, rate_interval, ratio_interval
from vsd.paths import TreeShape
from vsd.targets import Inputs, Target

FIELDS = {
    "drafter",
    "temperature",
    "tau",
    "tau_ci",
    "tokens_per_second",
    "speedup",
    "speedup_ci",
    "speedup_generate",
    "speedup_generate_ci",
    "acceptance_per_position",
    "latency",
    "identical",
}

# ---- bootstrap


def test_intervals_cover_about_as_often_as_they_say() -> None:
    """200 experiments of 40 prompts: a 90 % interval covers 160 … 194 times (binomial at 0.88, 1e-3 a side)."""
    rng = np.random.default_rng(0)
    tokens_mean, cost_mean = 50.0, 20.0
    covered = 0
    for seed in range(200):
        cost = rng.gamma(4.0, cost_mean / 4, size=40)
        tokens = cost * tokens_mean / cost_mean * rng.uniform(0.6, 1.4, size=40)
        low, high = rate_interval(tokens, cost, seed=seed, level=0.9)
        assert low < pooled_rate(tokens, cost) < high
        covered += low <= tokens_mean / cost_mean <= high
    assert 160 <= covered <= 194


def test_a_system_is_exactly_as_good_as_itself() -> None:
    """Paired: the same prompts are drawn for both, so nothing varies however much the prompts do."""
    rng = np.random.default_rng(1)
    tokens, cost = rng.integers(1, 90, 12).astype(float), rng.uniform(0.1, 9.0, 12)
    assert ratio_interval(tokens, cost, tokens, cost) == (1.0, 1.0)
    assert ratio_interval(2 * tokens, cost, tokens, cost) == pytest.approx((2.0, 2.0))


def test_rates_are_pooled_not_averaged() -> None:
    assert pooled_rate(np.array([1.0, 90.0]), np.array([1.0, 9.0])) == pytest.approx(9.1)
    assert rate_interval(np.array([3.0]), np.array([2.0])) == (1.5, 1.5)


def test_wider_levels_are_wider_and_seeds_repeat() -> None:
    rng = np.random.default_rng(2)
    tokens, cost = rng.uniform(1, 9, 20), rng.uniform(1, 2, 20)
    low, high = rate_interval(tokens, cost, level=0.5)
    wide_low, wide_high = rate_interval(tokens, cost, level=0.99)
    assert wide_low < low < high < wide_high
    assert rate_interval(tokens, cost, seed=3) == rate_interval(tokens, cost, seed=3)


def test_prompts_answered_with_one_token_do_not_spoil_the_interval() -> None:
    """They took no pass: a resample of nothing else has no rate and is left out."""
    assert rate_interval(np.array([0.0, 6.0]), np.array([0.0, 3.0])) == (2.0, 2.0)


# ---- prompts


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_user_turns_of_any_form(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "turns": ["one", "two"]},
        {"prompt": "three"},
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "four"},
                {"role": "assistant", "content": "not asked"},
                {"role": "user", "content": "five"},
            ]
        },
    ]
    found = load_prompts([write_lines(tmp_path / "suite.jsonl", rows)])
    assert found[0] == Prompt("a", "suite", None, ["one", "two"])
    assert found[1].turns == ["three"]
    assert (found[2].system, found[2].turns) == ("be brief", ["four", "five"])


def test_a_limit_spreads_over_each_file(tmp_path: Path) -> None:
    files = [
        write_lines(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}"} for i in range(count)])
        for name, count in (("a", 10), ("b", 2))
    ]
    found = load_prompts(files, limit=3)
    assert [p.turns[0] for p in found] == ["a0", "a3", "a6", "b0", "b1"]
    assert [p.suite for p in found] == ["a", "a", "a", "b", "b"]
    assert len(load_prompts(files)) == 12


def test_a_bad_prompt_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": 7}\n')
    with pytest.raises(VSDError, match=r"p\.jsonl:2"):
        load_prompts([path])


# ---- bench

SHAPE = TreeShape(depth=3, top_k=2, nodes=6)
PROMPTS = [
    Prompt("0", "mt", None, ["hi", "and then?"], {"category": "[talk]"}),
    Prompt("1", "mt", "be brief", ["why 1"]),
    Prompt("2", "qa", None, ["who 2"]),
]


@pytest.fixture(scope="module")
def drafter(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trained for a second, so that something is accepted."""
    text = tiny_run.tiny_examples(tiny_target, 48, 32)
    options: dict[str, Any] = {"learning_rate": 1e-2, "num_train_epochs": 6}
    trainer = tiny_run.tiny_trainer(tiny_target, text, tmp_path_factory.mktemp("bench"), **options)
    trainer.train()
    return trainer.model.eval()


@pytest.fixture(scope="module")
def report(tiny_target: Target, drafter: Any) -> dict[str, Any]:
    contenders = [Contender("tree", drafter, SHAPE), Contender("chain", drafter, TreeShape.chain(2))]
    return bench(tiny_target, contenders, PROMPTS, max_new_tokens=20, progress=False)


def test_plain_decoding_comes_first_and_is_the_unit(report: dict[str, Any]) -> None:
    plain, *others = report["runs"]
    assert plain["drafter"] is None and [run["drafter"] for run in others] == ["tree", "chain"]
    assert plain["tau"] == 1.0 and plain["speedup"] == 1.0 and plain["speedup_ci"] == (1.0, 1.0)
    assert plain["tree"] is None and plain["acceptance_per_position"] == []
    assert plain["identical"] == 1.0


def test_every_run_says_all_there_is(report: dict[str, Any]) -> None:
    plain = report["runs"][0]
    for run in report["runs"]:
        assert set(run) >= FIELDS
        assert run["temperature"] == 0.0
        assert set(run["latency"]) == {"draft", "verify", "commit", "prefill"}
        assert set(run["slices"]) == {"file", "category"} and set(run["slices"]["file"]) == {"mt", "qa"}
        assert set(run["slices"]["category"]) == {"[talk]"}
        assert sum(found["tokens"] for found in run["slices"]["file"].values()) == run["new_tokens"]
        assert sum(row["passes"] for row in run["by_context"]) > 0 and len(run["samples"]) == 3
        assert len(run["acceptance_per_position_ci"]) == len(run["acceptance_per_position"])
        assert run["speedup"] == pytest.approx(run["tokens_per_second"] / plain["tokens_per_second"])
        assert run["speedup_generate"] / plain["speedup_generate"] == pytest.approx(run["speedup"])
        assert run["tau_ci"][0] <= run["tau"] <= run["tau_ci"][1]
        assert run["speedup_ci"][0] <= run["speedup"] <= run["speedup_ci"][1]
    settings = {"max_new_tokens": 20, "seed": 0, "concurrency": [1], "prompts": ["0", "1", "2"]}
    assert report["settings"] == settings


def test_drafting_changes_speed_and_not_one_token(report: dict[str, Any]) -> None:
    tree, chain = report["runs"][1:]
    assert tree["identical"] == chain["identical"] == 1.0
    assert tree["new_tokens"] == chain["new_tokens"] == report["runs"][0]["new_tokens"]
    assert tree["tree"] == {"depth": 3, "top_k": 2, "nodes": 6, "p_min": 0.0, "lookup": 0}
    for run, depth in ((tree, 3), (chain, 2)):
        shares = run["acceptance_per_position"]
        assert len(shares) == depth and shares == sorted(shares, reverse=True)
        assert 1.1 < run["tau"] <= 1 + sum(shares) + 1e-9  # the end of an answer may cut what was accepted
        assert run["latency"]["draft"] > 0


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generate_samples_from_the_distribution_of_the_engine(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Whatever the model's own generation config holds. (A greedy answer has repetitions that a penalty avoids.)"""
    from vsd.evaluation.bench import Answers, _generate

    asked, sampling = [Inputs([5, 6, 7]), Inputs([9, 8])], Sampling(20, temperature, seed=1)

    def answered() -> list[list[int]]:
        answers = Answers()
        _generate(tiny_target, asked, sampling, answers, 0)
        return [result.tokens for result in answers.results]

    before, own = answered(), tiny_target.model.generation_config
    config = copy.deepcopy(own)
    config.update(repetition_penalty=1.5, top_p=0.3, min_p=0.2, typical_p=0.5, no_repeat_ngram_size=1)
    config.update(suppress_tokens=[token for answer in before for token in answer[:1]])
    monkeypatch.setattr(tiny_target.model, "generation_config", config)
    assert answered() == before
    assert tiny_target.model.generation_config is config
    if temperature == 0:
        assert before == [result.tokens for result in Engine(tiny_target).generate(asked, sampling)]


def test_tau_is_pooled_over_all_passes(tiny_target: Target, drafter: Any, report: dict[str, Any]) -> None:
    """The single-turn prompts again, by hand."""
    from vsd.data import prompt_inputs

    ids = prompt_inputs(tiny_target.tokenizer, [{"role": "user", "content": "who 2"}]).ids
    (result,) = Engine(tiny_target, drafter, SHAPE).generate([ids], Sampling(20))
    wanted = (len(result.tokens) - 1) / len(result.delivered)  # the first token is the prefill's
    assert report["runs"][1]["slices"]["file"]["qa"]["tau"] == pytest.approx(wanted)


def test_the_report_is_json_and_a_table(report: dict[str, Any], tmp_path: Path) -> None:
    write_json(report, tmp_path / "deep" / "out.json")
    read = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert isinstance(read["runs"], list) and len(read["runs"]) == 3
    assert read["runs"][0]["drafter"] is None
    assert read == json.loads(json.dumps(report))
    assert set(read["versions"]) == {"vsd", "torch", "transformers"} and read["machine"]["threads"] >= 1
    buffer = io.StringIO()
    print_table(report, Console(file=buffer, width=160))
    text = buffer.getvalue()
    assert all(word in text for word in ("plain", "tree", "chain", "3x2x6", f"{report['runs'][1]['tau']:.2f}"))
    assert "bonus token included" in text


@pytest.fixture(scope="module")
def together(tiny_target: Target, drafter: Any) -> dict[str, Any]:
    contenders = [Contender("tree", drafter, SHAPE, trained=16)]
    return bench(tiny_target, contenders, PROMPTS, concurrency=(2, 1), max_new_tokens=20, progress=False)


def test_prompts_decoded_together_are_accepted_alike(report: dict[str, Any], together: dict[str, Any]) -> None:
    """Two at a time, then one: the same answers to the same turns, and a pass for both prompts."""
    plain, tree = together["runs"]
    assert together["settings"]["concurrency"] == [2, 1]
    assert tree["tau"] == pytest.approx(report["runs"][1]["tau"]) and tree["identical"] == 1.0
    assert tree["slices"] == report["runs"][1]["slices"] and tree["samples"] == report["runs"][1]["samples"]
    for run in (plain, tree):
        assert [at["concurrency"] for at in run["by_concurrency"]] == [2, 1]
        first, second = run["by_concurrency"]
        assert first["tau"] == pytest.approx(second["tau"]) == pytest.approx(run["tau"])
        assert first["tokens_per_second"] == run["tokens_per_second"] and first["speedup"] == run["speedup"]
        assert first["ms_per_pass"] == pytest.approx(sum(run["latency"][k] for k in ("draft", "verify", "commit")))
        assert all(at["speedup_ci"][0] <= at["speedup"] <= at["speedup_ci"][1] for at in run["by_concurrency"])


@pytest.mark.parametrize("sizes", [[0], [2, -1], []])
def test_a_concurrency_is_a_number_of_prompts(tiny_target: Target, sizes: list[int]) -> None:
    with pytest.raises(VSDError, match="1 or more"):
        bench(tiny_target, [], PROMPTS, concurrency=sizes, max_new_tokens=4, progress=False)


def test_details_stand_behind_their_heading(report: dict[str, Any], together: dict[str, Any]) -> None:
    def printed(report: dict[str, Any]) -> str:
        buffer = io.StringIO()
        print_details(report, Console(file=buffer, width=120))
        return buffer.getvalue()

    text = printed(report)
    assert text.index("details") < min(text.index(f"τ by {name}") for name in ("file", "category"))
    run = report["runs"][1]
    for number in (run["slices"]["file"]["qa"]["tau"], run["acceptance_per_position"][0], run["by_context"][0]["tau"]):
        assert f"{number:.2f} [" in text
    assert "[talk]" in text and "requests at a time" not in text and "beyond" not in text
    text = printed(together)
    assert "requests at a time" in text and "plain" in text
    assert (
        text.count("beyond the 16 trained") == sum(row["from"] >= 16 for row in together["runs"][1]["by_context"]) > 0
    )
    assert printed({**report, "runs": report["runs"][:1]}) == ""


def test_sampling_is_measured_without_a_claim_of_identity(tiny_target: Target, drafter: Any) -> None:
    contenders = [Contender("c", drafter, TreeShape.chain(3), "rejection")]
    report = bench(tiny_target, contenders, PROMPTS[1:], temperatures=(0.0, 1.0), max_new_tokens=8, progress=False)
    assert [(run["drafter"], run["temperature"]) for run in report["runs"]] == [
        (None, 0.0),
        ("c", 0.0),
        (None, 1.0),
        ("c", 1.0),
    ]
    plain, run = report["runs"][2:]
    assert plain["tau"] == 1.0 and plain["speedup"] == 1.0  # each temperature has its own baseline
    assert report["runs"][1]["identical"] == 1.0
    assert run["identical"] is None and run["verification"] == "rejection" and run["temperature"] == 1.0
    assert math.isfinite(run["tau"]) and run["tau"] >= 1.0
    json.dumps(report, allow_nan=False)


def test_without_drafters_only_plain_decoding_is_measured(tiny_target: Target) -> None:
    report = bench(tiny_target, [], PROMPTS[2:], max_new_tokens=4, progress=False)
    assert [run["drafter"] for run in report["runs"]] == [None]


def test_answers_of_one_token_cannot_be_measured(tiny_target: Target, drafter: Any) -> None:
    with pytest.raises(VSDError, match="nothing to draft"):
        bench(tiny_target, [Contender("t", drafter, SHAPE)], PROMPTS[2:], max_new_tokens=1, progress=False)
