"""At temperature > 0 the engine's samples have exactly the law of plain sampling, whatever is done to the logits.

The law is enumerated from a tiny vocabulary. A stronger statement holds for rule `target`: with the same seed the
answer is token for token that of transformers' `generate`, with or without a drafter.
"""

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LogitsProcessorList

from architectures import GROUPED, SIZES, build
from goodness import p_value
from overfit import PROMPTS, fluent_pair, random_drafter
from processors import PROCESSORS, alternate, positional
from vsd.decoding import Engine, Result, Sampling
from vsd.paths import TreeShape
from vsd.targets import Target

V, LENGTH, N = 5, 4, 3000
PROMPT = [1, 4, 2, 2, 0, 3]


@pytest.fixture(scope="module")
def target() -> Target:
    return build(LlamaConfig(**{**SIZES, "vocab_size": V, "initializer_range": 0.15}, **GROUPED))


@torch.no_grad()
def exact_law(target: Target, sampling: Sampling) -> Tensor:
    """Probability of every continuation of the prompt by LENGTH tokens, in the order of `itertools.product`.

    Plain sampling, prefix by prefix: the model's own logits, then the processors, on the prefix and nothing else.
    """
    law = torch.ones(1, dtype=torch.double)
    for length in range(LENGTH):
        paths = torch.tensor(list(itertools.product(range(V), repeat=length)), dtype=torch.long)
        ids = torch.cat([torch.tensor([PROMPT]).expand(len(paths), -1), paths], dim=1)
        logits = target.model(ids).logits[:, -1]
        rows = [sampling.pipeline()(row[None], scores[None].clone()) for row, scores in zip(ids, logits)]
        law = (law[:, None] * torch.cat(rows).double().softmax(-1)).flatten()
    return law


def sampled(target: Target, name: str, options: dict[str, Any], count: int = N) -> list[Result]:
    """`count` answers in one batch, each with its own seed."""
    shape, rule = ENGINES[name]
    drafter = None if shape is None else random_drafter(target, size=V - 1)
    requests = [Sampling(LENGTH, eos_ids=(), seed=seed, **options) for seed in range(count)]
    return Engine(target, drafter, shape, rule).generate([PROMPT] * count, requests)


def counts_of(results: list[Result]) -> Tensor:
    weights = torch.tensor([V**i for i in reversed(range(LENGTH))])
    return torch.bincount(torch.tensor([r.tokens for r in results]) @ weights, minlength=V**LENGTH)


def draws(law: Tensor, count: int = N) -> Tensor:
    """Counts of draws from the law itself."""
    drawn = torch.multinomial(law, count, replacement=True, generator=torch.Generator().manual_seed(0))
    return torch.bincount(drawn, minlength=len(law))


ENGINES: dict[str, tuple[TreeShape | None, str]] = {
    "plain": (None, "auto"),
    "tree": (TreeShape(3, 3, 9), "auto"),
    "narrow tree": (TreeShape(2, 2, 4), "auto"),
    "chain": (TreeShape.chain(3), "auto"),
    "sampled chain": (TreeShape.chain(3), "rejection"),
    "early end": (TreeShape(3, 3, 9, 0.2), "auto"),
    "with lookup": (TreeShape(2, 2, 4, lookup=3), "auto"),
    "early end of a sampled chain": (TreeShape.chain(3, 0.05), "rejection"),
}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", ENGINES)
def test_samples_have_the_targets_law(target: Target, name: str, temperature: float) -> None:
    """χ² of the first 4 tokens (625 cells, rare ones pooled), n = 3,000 in one batch, false alarm 1e-4 a case.

    The seeds are fixed. The drafter knows 4 of the 5 tokens.
    """
    shape, _ = ENGINES[name]
    results = sampled(target, name, {"temperature": temperature})
    assert p_value(counts_of(results), exact_law(target, Sampling(temperature=temperature))) > 1e-4
    accepted = torch.tensor([r.accepted[0] for r in results])
    if shape is not None:  # paths of every length were accepted, so their law was tested
        assert all((accepted == a).sum() > 10 for a in range(min(shape.depth, 2) + 1))


OPTIONS: dict[str, dict[str, Any]] = {
    "top-p": {"temperature": 1.0, "top_p": 0.7},
    "top-k": {"temperature": 0.8, "top_k": 3},
    "min-p": {"temperature": 1.3, "min_p": 0.3},
    "penalty": {"temperature": 1.0, "repetition_penalty": 3.0},
    "bias": {"temperature": 0.9, "logit_bias": {0: 1.0, 3: -2.0, 4: -float("inf")}},
    "structured": {"temperature": 1.0, "processors": (alternate,)},
    "all": {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "logit_bias": {1: 0.5},
        "processors": (positional,),
    },
}


@pytest.mark.parametrize("name", ["tree", "sampled chain"])
@pytest.mark.parametrize("options", OPTIONS)
def test_processed_samples_have_the_processed_law(target: Target, name: str, options: str) -> None:
    """The same statistic, n = 1,000, false alarm 1e-4 a case: 14 cases, 1.4e-3 in all; seeds are fixed.

    Every option changes the law so much that samples of the law without it are told apart.
    """
    asked = OPTIONS[options]
    law = exact_law(target, Sampling(**asked))
    results = sampled(target, name, asked, 1000)
    assert p_value(counts_of(results), law) > 1e-4
    assert sum(sum(r.accepted) for r in results) > 100
    assert p_value(draws(exact_law(target, Sampling(temperature=asked["temperature"])), 1000), law) < 1e-6


def test_the_test_can_fail(target: Target) -> None:
    """The same statistic tells temperature 1 from 0.8, and 3,000 draws of the law itself pass."""
    law = exact_law(target, Sampling(temperature=1.0))
    assert p_value(counts_of(sampled(target, "plain", {"temperature": 0.8})), law) < 1e-4
    assert p_value(draws(law), law) > 1e-4


# ---- token for token


@torch.no_grad()
def by_transformers(target: Target, prompt: list[int], count: int, sampling: Sampling) -> list[int]:
    """What `generate` answers after `torch.manual_seed(seed)`."""
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        options |= {"top_p": sampling.top_p, "min_p": sampling.min_p or None}
    if sampling.logit_bias:
        options["sequence_bias"] = [[[token], bias] for token, bias in sampling.logit_bias.items()]
    torch.manual_seed(sampling.seed)
    output = target.model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        eos_token_id=10**6,
        pad_token_id=2,
        repetition_penalty=sampling.repetition_penalty,
        # hidden in functions: of two processors of a class, `generate` would drop the one the options ask for
        logits_processor=LogitsProcessorList(lambda ids, scores, p=p: p(ids, scores) for p in sampling.processors),
        **options,
    )
    return output[0, len(prompt) :].tolist()


SHAPES = {"plain": None, "tree": TreeShape(4, 3, 12), "chain": TreeShape.chain(3)}


def asked(processor: str, temperature: float, **more: Any) -> list[Sampling]:
    """One request a prompt, each with a processor of its own."""
    make = PROCESSORS[processor]
    return [
        Sampling(28, temperature, eos_ids=(), seed=seed, processors=(make(),), **more) for seed in range(len(PROMPTS))
    ]


def biased(processor: str, temperature: float) -> list[Sampling]:
    return asked(processor, temperature, repetition_penalty=1.1, logit_bias={40: 0.5}, min_p=0.02)


@cache
def wanted(name: str, ask: Callable[[str, float], list[Sampling]], processor: str, temperature: float) -> Any:
    """Transformers' answers to PROMPTS with a target."""
    target, _ = fluent_pair(name)
    return [by_transformers(target, prompt, 28, one) for prompt, one in zip(PROMPTS, ask(processor, temperature))]


@pytest.mark.parametrize(("target_name", "shape"), [("llama", "tree"), ("qwen3", "chain"), ("gemma3", "tree")])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("name", PROCESSORS)
def test_answers_are_those_of_transformers(target_name: str, name: str, temperature: float, shape: str) -> None:
    """Ragged prompts in one batch; greedy and sampled, with every kind of processor, stateful ones included."""
    target, drafter = fluent_pair(target_name)
    results = Engine(target, drafter, SHAPES[shape]).generate(PROMPTS, biased(name, temperature))
    assert [result.tokens for result in results] == wanted(target_name, biased, name, temperature)
    if name in ("penalty", "typical") and shape == "tree":  # the others lead away from what the drafter knows
        assert max(a for r in results for a in r.accepted) >= 1


@pytest.mark.parametrize("rule", ["auto", "rejection"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_at_temperature_zero_processed_answers_do_not_depend_on_the_rule(name: str, rule: str) -> None:
    """A row at temperature 0 beside one that samples: its chain is drafted and verified as a certain one."""
    target, drafter = fluent_pair("llama")
    requests = asked(name, 0.0)
    requests[1] = Sampling(28, 1.0, eos_ids=(), processors=(PROCESSORS[name](),))
    results = Engine(target, drafter, TreeShape.chain(3), rule).generate(PROMPTS, requests)
    for i, tokens in enumerate(wanted("llama", asked, name, 0.0)):
        assert i == 1 or results[i].tokens == tokens


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.0, 0.4, 1.0, 2.0]),
    top_p=st.sampled_from([0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 40, 1000]),
    min_p=st.sampled_from([0.0, 0.1]),
    penalty=st.sampled_from([0.8, 1.0, 1.7]),
    bias=st.dictionaries(st.integers(16, 100), st.floats(-5, 5), max_size=3),
    shape=st.sampled_from(sorted(SHAPES)),
)
def test_any_settings_give_the_answer_of_transformers(
    seed: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    penalty: float,
    bias: dict[int, float],
    shape: str,
) -> None:
    target, drafter = fluent_pair("llama")
    sampling = Sampling(12, temperature, (), (), seed, top_p, top_k, min_p, penalty, bias)
    engine = Engine(target, drafter if SHAPES[shape] else None, SHAPES[shape])
    results = engine.generate(PROMPTS, sampling)
    assert [r.tokens for r in results] == [by_transformers(target, prompt, 12, sampling) for prompt in PROMPTS]


# ---- a request of its own


@pytest.mark.parametrize("rule", ["auto", "rejection"])
def test_a_request_does_not_depend_on_its_batch(rule: str) -> None:
    """Temperatures, seeds, lengths, ends and processors of each row's own; rows come alone, together and reversed."""
    target, drafter = fluent_pair("llama")
    engine = Engine(target, drafter, TreeShape.chain(3), rule)
    eos = engine.generate([PROMPTS[0]], Sampling(9, eos_ids=()))[0].tokens[7]
    requests = [
        (PROMPTS[0], Sampling(20, 1.0, (), seed=1)),
        (PROMPTS[0], Sampling(20, 1.0, (), seed=2)),
        (PROMPTS[0], Sampling(24, eos_ids=(eos,))),
        (PROMPTS[1], Sampling(7, 0.7, (), top_p=0.8, repetition_penalty=1.2)),
        (PROMPTS[2], Sampling(0, 1.0)),
        (PROMPTS[2], Sampling(1, 1.0, ())),
        (PROMPTS[2], Sampling(24, 0.5, (), processors=(alternate,), logit_bias={40: 3.0})),
        (PROMPTS[0], Sampling(20, 1.0, (), seed=1)),
    ]
    alone = [engine.generate([prompt], sampling)[0] for prompt, sampling in requests]
    prompts, samplings = [prompt for prompt, _ in requests], [sampling for _, sampling in requests]
    together = engine.generate(prompts, samplings)
    backwards = engine.generate(prompts[::-1], samplings[::-1])[::-1]
    assert alone == together == backwards
    assert [len(r.tokens) for r in alone] == [20, 20, 8, 7, 0, 1, 24, 20]
    assert [r.finish for r in alone] == ["length", "length", "stop", *["length"] * 5]
    assert alone[0].tokens == alone[7].tokens != alone[1].tokens
