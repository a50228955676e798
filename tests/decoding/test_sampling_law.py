"""At temperature > 0 the engine's samples have exactly the target's law, enumerated from a tiny vocabulary."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from architectures import GROUPED, SIZES, build
from goodness import p_value
from overfit import random_drafter
from vsd.decoding import Engine, Sampling
from vsd.drafters import Eagle3Drafter
from vsd.paths import TreeShape
from vsd.targets import Target

V, LENGTH, N = 5, 4, 3000
PROMPT = [1, 4, 2, 2, 0, 3]


@pytest.fixture(scope="module")
def target() -> Target:
    return build(LlamaConfig(**{**SIZES, "vocab_size": V, "initializer_range": 0.15}, **GROUPED))


@torch.no_grad()
def exact_law(target: Target, temperature: float) -> Tensor:
    """Probability of every continuation of the prompt by LENGTH tokens, in the order of `itertools.product`."""
    paths = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
    ids = torch.cat([torch.tensor([PROMPT]).expand(len(paths), -1), paths], dim=1)
    logp = (target.model(ids).logits.double() / temperature).log_softmax(-1)[:, len(PROMPT) - 1 : -1]
    return logp.gather(-1, paths[..., None])[..., 0].sum(1).exp()


def sampled(target: Target, drafter: Eagle3Drafter | None, shape: TreeShape | None, rule: str, t: float) -> list:
    return Engine(target, drafter, shape, rule).generate([PROMPT] * N, Sampling(LENGTH, t, eos_ids=(), seed=11))


def counts_of(answers: list[list[int]]) -> Tensor:
    weights = torch.tensor([V**i for i in reversed(range(LENGTH))])
    return torch.bincount(torch.tensor(answers) @ weights, minlength=V**LENGTH)


ENGINES = {
    "plain": (None, "auto"),
    "tree": (TreeShape(3, 3, 9), "auto"),
    "narrow tree": (TreeShape(2, 2, 4), "auto"),
    "chain": (TreeShape.chain(3), "auto"),
    "sampled chain": (TreeShape.chain(3), "rejection"),
}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", ENGINES)
def test_samples_have_the_targets_law(target: Target, name: str, temperature: float) -> None:
    """χ² of the first 4 tokens (625 cells, rare ones pooled), n = 3,000 in one batch, false alarm 1e-4 a case.

    The seed is fixed. The drafter knows 4 of the 5 tokens.
    """
    shape, rule = ENGINES[name]
    drafter = None if shape is None else random_drafter(target, size=V - 1)
    results = sampled(target, drafter, shape, rule, temperature)
    assert p_value(counts_of([r.tokens for r in results]), exact_law(target, temperature)) > 1e-4
    accepted = torch.tensor([r.accepted[0] for r in results])
    if shape is not None:  # paths of every length were accepted, so their law was tested
        assert all((accepted == a).sum() > 20 for a in range(min(shape.depth, 2) + 1))


def test_the_test_can_fail(target: Target) -> None:
    """The same statistic tells temperature 1 from 0.8, and 3,000 draws of the law itself pass."""
    results = sampled(target, None, None, "auto", 0.8)
    assert p_value(counts_of([r.tokens for r in results]), exact_law(target, 1.0)) < 1e-4
    law = exact_law(target, 1.0)
    draws = torch.multinomial(law, N, replacement=True, generator=torch.Generator().manual_seed(0))
    assert p_value(torch.bincount(draws, minlength=len(law)), law) > 1e-4
