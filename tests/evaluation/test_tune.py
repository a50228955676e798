"""The tree is chosen by what a step costs and what it delivers."""

import io
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import seeing
from architectures import llama
from overfit import PROMPTS, fluent_pair
from vsd.decoding import Engine, Result, Sampling
from vsd.decoding.engine import Step
from vsd.decoding.statistics import acceptance_length
from vsd.drafters import FAMILIES, draft_vocabulary, new_drafter
from vsd.errors import VSDError
from vsd.evaluation import Tuned, best, print_trees, tune
from vsd.evaluation.tune import Costs, shared_steps
from vsd.paths import TreeShape
from vsd.targets import Inputs, Target

SHAPES = [TreeShape.chain(1), TreeShape.chain(3), TreeShape(3, 3, 8), TreeShape(3, 3, 8, 0.05)]


def test_expected_speedup_is_what_the_texts_take() -> None:
    target, drafter = fluent_pair("llama")
    results = [Engine(target).generate([prompt], Sampling(24, eos_ids=()))[0] for prompt in PROMPTS]
    found = tune(target, drafter, [(r.prompt, r.tokens) for r in results], SHAPES, progress=False)
    assert {tuned.shape for tuned in found} == set(SHAPES)
    assert [t.speedup for t in found] == sorted((t.speedup for t in found), reverse=True)
    for tuned in found:
        engine = Engine(target, drafter, tuned.shape)
        decoded = [engine.generate([prompt], Sampling(24, eos_ids=()))[0] for prompt in PROMPTS]
        assert tuned.tau == pytest.approx(acceptance_length(decoded))
    by_shape: dict[TreeShape, Tuned] = {tuned.shape: tuned for tuned in found}
    assert by_shape[SHAPES[2]].tau >= by_shape[SHAPES[1]].tau > by_shape[SHAPES[0]].tau > 1
    pruned = by_shape[SHAPES[3]]
    assert 1 < pruned.tau <= by_shape[SHAPES[2]].tau and pruned.seconds > 0


EVERY = draft_vocabulary(torch.arange(128), 128, 128)
COSTS = Costs(reading=(1e-3, 2e-3), plain=0.1, draft={(4, 2): 0.08}, verify={1: 0.1, 5: 0.14, 9: 0.2}, rest=0.01)


def test_a_step_costs_its_levels_and_its_nodes() -> None:
    assert COSTS.step(TreeShape(4, 2, 9), 9, 4) == pytest.approx(0.08 + 0.2 + 0.01)
    assert COSTS.step(TreeShape(4, 2, 9, 0.1), 3, 2) == pytest.approx(0.04 + 0.12 + 0.01)
    assert COSTS.step(TreeShape(4, 2, 9, lookup=8), 9, 0) == pytest.approx(0.2 + 0.01)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), max_size=5), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_a_shared_step_is_as_large_as_its_largest_tree(trees: list[list[tuple[int, int]]], concurrency: int) -> None:
    """A loop over steps: request i answers texts i, i + n, … one after another."""
    shape = TreeShape(4, 2, 9, 0.1)
    slots: list[list[tuple[int, int]]] = [[] for _ in range(concurrency)]
    for i, text in enumerate(trees):
        slots[i % concurrency].extend(text)
    wanted = []
    while active := [slot.pop(0) for slot in slots if slot]:
        nodes, levels = max(n for n, _ in active), max(k for _, k in active)
        wanted.append((COSTS.step(shape, nodes, levels), len(active) / concurrency))
    assert shared_steps(COSTS, shape, trees, concurrency) == wanted
    alone = shared_steps(COSTS, shape, trees, 1)
    assert alone == [(COSTS.step(shape, *size), 1.0) for text in trees for size in text]


def test_a_pass_is_timed_with_as_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = fluent_pair("llama")
    batches: list[int] = []

    stream = Engine.stream

    def watched(engine: Engine, results: list[Result], sampling: Any) -> Iterator[Step]:
        batches.append(len(results))
        return stream(engine, results, sampling)

    results = [Engine(target).generate([prompt], Sampling(8, eos_ids=()))[0] for prompt in PROMPTS]
    texts = [(r.prompt, r.tokens) for r in results]
    monkeypatch.setattr(Engine, "stream", watched)
    found = tune(target, drafter, texts, SHAPES[:2], progress=False, concurrency=3)
    assert batches == [3, 3, 3]  # plain decoding and two trees
    assert len(found) == 2 and all(tuned.speedup > 0 and tuned.tau > 1 for tuned in found)
    buffer = io.StringIO()
    print_trees(found, Console(file=buffer), concurrency=3)
    assert "3 requests at a time" in buffer.getvalue()
    with pytest.raises(VSDError, match="1 or more"):
        tune(target, drafter, texts, SHAPES, progress=False, concurrency=0)


def test_few_caches_are_alive_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = fluent_pair("llama")
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most, new_cache = [0], Target.new_cache

    def watched(self: Target, rows: int, capacity: int) -> Any:
        cache = new_cache(self, rows, capacity)
        alive.add(cache)
        most.append(1 + sum(bool(other.slots.stores) for other in alive))
        return cache

    monkeypatch.setattr(Target, "new_cache", watched)
    shapes = [TreeShape(depth, top_k, 6) for depth in (2, 3, 4) for top_k in (2, 3, 4)][:7]
    costs = Costs.measure(target, drafter, Inputs(PROMPTS[0]), shapes, concurrency=2)
    assert len(costs.draft) == 7 and all(seconds > 0 for seconds in costs.draft.values())
    assert len(most) == 1 + 7 + 3  # plain decoding is in each of three rounds
    assert max(most) == 4


def test_a_block_costs_one_pass_however_deep_the_tree_gets() -> None:
    block = replace(COSTS, one_pass=True)
    assert block.step(TreeShape(4, 2, 9, 0.1), 3, 2) == pytest.approx(0.08 + 0.12 + 0.01)
    assert block.step(TreeShape(4, 2, 9, lookup=8), 9, 0) == pytest.approx(0.2 + 0.01)
    targets = {family: llama() for family in FAMILIES} | {"vispec": seeing.target("llava")}
    found = {family: new_drafter(target, EVERY, family).one_pass for family, target in targets.items()}
    assert found == {family: family not in ("eagle3", "vispec", "lm") for family in FAMILIES}


def test_among_equally_fast_trees_the_longest_accepted_is_best() -> None:
    speeds = {(1, 1, 2): (1.39, 1.20), (2, 3, 6): (1.72, 1.19), (3, 3, 8): (1.83, 1.11)}
    found = [Tuned(TreeShape(*sizes), tau, 0.05, speedup) for sizes, (tau, speedup) in speeds.items()]
    assert best(found).shape == TreeShape(2, 3, 6)


def test_nothing_to_tune_on() -> None:
    target, drafter = fluent_pair("llama")
    with pytest.raises(VSDError, match="nothing to draft"):
        tune(target, drafter, [(Inputs(PROMPTS[0]), [2])], SHAPES, progress=False)
