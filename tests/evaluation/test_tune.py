"""The tree is chosen by what a step costs and what it delivers."""

from dataclasses import replace

import pytest
import torch

from architectures import llama
from overfit import PROMPTS, fluent_pair
from vsd.decoding import Engine, Sampling
from vsd.decoding.statistics import acceptance_length
from vsd.drafters import FAMILIES, draft_vocabulary, new_drafter
from vsd.errors import VSDError
from vsd.evaluation import Tuned, best, tune
from vsd.evaluation.tune import Costs
from vsd.paths import TreeShape
from vsd.targets import Inputs

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


def test_a_block_costs_one_pass_however_deep_the_tree_gets() -> None:
    block = replace(COSTS, one_pass=True)
    assert block.step(TreeShape(4, 2, 9, 0.1), 3, 2) == pytest.approx(0.08 + 0.12 + 0.01)
    assert block.step(TreeShape(4, 2, 9, lookup=8), 9, 0) == pytest.approx(0.2 + 0.01)
    found = {family: new_drafter(llama(), EVERY, family).one_pass for family in FAMILIES}
    assert found == {family: family not in ("eagle3", "lm") for family in FAMILIES}


def test_among_equally_fast_trees_the_longest_accepted_is_best() -> None:
    speeds = {(1, 1, 2): (1.39, 1.20), (2, 3, 6): (1.72, 1.19), (3, 3, 8): (1.83, 1.11)}
    found = [Tuned(TreeShape(*sizes), tau, 0.05, speedup) for sizes, (tau, speedup) in speeds.items()]
    assert best(found).shape == TreeShape(2, 3, 6)


def test_nothing_to_tune_on() -> None:
    target, drafter = fluent_pair("llama")
    with pytest.raises(VSDError, match="nothing to draft"):
        tune(target, drafter, [(Inputs(PROMPTS[0]), [2])], SHAPES, progress=False)
