"""The tree is chosen by what a step costs and what it delivers."""

import pytest

from overfit import PROMPTS, fluent_pair
from vsd.decoding import Engine, Sampling
from vsd.decoding.statistics import acceptance_length
from vsd.errors import VSDError
from vsd.evaluation import Tuned, best, tune
from vsd.paths import TreeShape

SHAPES = [TreeShape.chain(1), TreeShape.chain(3), TreeShape(3, 3, 8)]


def test_expected_speedup_is_tau_over_cost() -> None:
    target, drafter = fluent_pair("llama")
    results = Engine(target).generate(PROMPTS, Sampling(24, eos_ids=()))
    found = tune(target, drafter, [(r.prompt, r.tokens) for r in results], SHAPES, progress=False)
    assert {tuned.shape for tuned in found} == set(SHAPES)
    assert [t.speedup for t in found] == sorted((t.speedup for t in found), reverse=True)
    plain = {tuned.speedup * tuned.seconds / tuned.tau for tuned in found}
    assert max(plain) == pytest.approx(min(plain)) and min(plain) > 0
    for tuned in found:
        decoded = Engine(target, drafter, tuned.shape).generate(PROMPTS, Sampling(24, eos_ids=()))
        assert tuned.tau == pytest.approx(acceptance_length(decoded))
    by_shape: dict[TreeShape, Tuned] = {tuned.shape: tuned for tuned in found}
    assert by_shape[SHAPES[2]].tau >= by_shape[SHAPES[1]].tau > by_shape[SHAPES[0]].tau > 1


def test_among_equally_fast_trees_the_longest_accepted_is_best() -> None:
    speeds = {(1, 1, 2): (1.39, 1.20), (2, 3, 6): (1.72, 1.19), (3, 3, 8): (1.83, 1.11)}
    found = [Tuned(TreeShape(*sizes), tau, 0.05, speedup) for sizes, (tau, speedup) in speeds.items()]
    assert best(found).shape == TreeShape(2, 3, 6)


def test_nothing_to_tune_on() -> None:
    target, drafter = fluent_pair("llama")
    with pytest.raises(VSDError, match="nothing to draft"):
        tune(target, drafter, [(PROMPTS[0], [2])], SHAPES, progress=False)
