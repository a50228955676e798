"""What goes wrong is said, and nothing wrong is delivered: faults in targets, drafters, processors and callers."""

import copy
import itertools
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import tiny
from architectures import GROUPED, SIZES, build, llama
from overfit import PROMPTS, fluent_pair, greedy, random_drafter
from processors import alternate
from vsd.decoding import Engine, Result, Sampling
from vsd.drafters import DraftVocabulary, new_drafter
from vsd.drafters.eagle3 import Eagle3Drafter
from vsd.errors import VSDError
from vsd.paths import TreeShape
from vsd.targets import Inputs, Target

Pair = tuple[Target, Eagle3Drafter]
ENGINES = {
    "plain": (None, "auto"),
    "tree": (TreeShape(4, 3, 12), "auto"),
    "rejection": (TreeShape.chain(3), "rejection"),
}


@pytest.fixture
def pair() -> Pair:
    """A target and its drafter, to be damaged."""
    return copy.deepcopy(fluent_pair("llama"))


def engine_of(pair: Pair, name: str) -> Engine:
    shape, rule = ENGINES[name]
    return Engine(pair[0], None if shape is None else pair[1], shape, rule)


def poison(parameter: Tensor, value: float) -> None:
    parameter.data.view(-1)[0] = value


WEIGHTS: dict[str, Callable[[Any], Tensor]] = {
    "a layer": lambda model: model.model.layers[1].mlp.down_proj.weight,
    "the head": lambda model: model.lm_head.weight,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("where", WEIGHTS)
def test_a_target_that_computes_nan_delivers_nothing_more(
    pair: Pair, where: str, name: str, temperature: float
) -> None:
    """At prefill, and in the middle of an answer: what was delivered until then is right."""
    engine = engine_of(pair, name)
    sampling = Sampling(20, temperature, eos_ids=())
    expected = [r.tokens for r in engine.generate(PROMPTS, sampling)]
    weight = WEIGHTS[where](pair[0].model)
    for value in (float("nan"), float("inf")):
        results, before = [Result(Inputs(prompt)) for prompt in PROMPTS], weight.view(-1)[0].item()
        steps = engine.stream(results, sampling)
        assert len(list(islice(steps, 3))) == 3
        poison(weight, value)
        with pytest.raises(VSDError, match=r"the (target|drafter) computes NaN or infinity"):
            next(steps)
        for result, tokens in zip(results, expected):
            assert 3 <= len(result.tokens) < 20 and result.tokens == tokens[: len(result.tokens)]
        with pytest.raises(VSDError, match="the target computes NaN or infinity"):
            engine.generate(PROMPTS, sampling)
        poison(weight, before)
        assert [r.tokens for r in engine.generate(PROMPTS, sampling)] == expected


@pytest.mark.parametrize("name", ["tree", "rejection"])
def test_a_drafter_that_computes_nan_later_delivers_nothing_more(pair: Pair, name: str) -> None:
    engine, sampling = engine_of(pair, name), Sampling(20, eos_ids=())
    results = [Result(Inputs(prompt)) for prompt in PROMPTS]
    steps = engine.stream(results, sampling)
    next(steps)
    poison(pair[1].midlayer.mlp.down_proj.weight, float("nan"))
    with pytest.raises(VSDError, match="the drafter computes NaN"):
        list(steps)
    for result in results:
        assert result.tokens == greedy(pair[0], result.prompt.ids, 20, endless=True)[: len(result.tokens)]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"vocab_size": 96}, "vocabulary 128, not 96"),
    "width": ({"hidden_size": 16, "intermediate_size": 32}, "hidden size 32, not 16"),
    "layer count": ({"num_hidden_layers": 6}, "fingerprint"),
    "weights": ({}, "fingerprint"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_drafter_of_another_target_is_refused(pair: Pair, what: str) -> None:
    sizes, reason = OTHERS[what]
    other = build(LlamaConfig(**{**SIZES, **GROUPED, **sizes}), seed=3)
    with pytest.raises(VSDError, match=f"trained for another target: {reason}"):
        Engine(other, pair[1])
    Engine(pair[0], pair[1])


def test_drafters_of_different_layers_share_a_target(pair: Pair) -> None:
    """In turns, step by step: neither sees the other's features."""
    target, drafter = pair
    vocabulary = DraftVocabulary(torch.arange(tiny.VOCAB), tiny.VOCAB)
    other = new_drafter(target, vocabulary, aux_layers=[0, 1, 3]).eval()
    small = new_drafter(target, vocabulary, "lm", num_hidden_layers=1).eval()
    engines = [Engine(target, d, TreeShape(3, 2, 5)) for d in (drafter, other, small)]
    alone = [engine.generate(PROMPTS, Sampling(12)) for engine in engines]
    together = [[Result(Inputs(prompt)) for prompt in PROMPTS] for _ in engines]
    for _ in itertools.zip_longest(*(e.stream(r, Sampling(12)) for e, r in zip(engines, together))):
        pass
    assert [[r.accepted for r in results] for results in together] == [[r.accepted for r in rs] for rs in alone]
    assert [r.tokens for r in together[0]] == [r.tokens for r in together[1]] == [r.tokens for r in together[2]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ENGINES)
def test_a_processor_that_leaves_no_token_is_an_error(pair: Pair, name: str, temperature: float) -> None:
    """From a given length on; what is delivered until then is right."""
    engine = engine_of(pair, name)

    def none_left(ids: Tensor, scores: Tensor) -> Tensor:
        return scores - torch.inf if ids.shape[1] > len(PROMPTS[0]) + 6 else scores

    expected = engine.generate([PROMPTS[0]], Sampling(20, temperature, eos_ids=()))[0].tokens
    results = [Result(Inputs(PROMPTS[0]))]
    with pytest.raises(VSDError, match="the logits processors leave no token"):
        list(engine.stream(results, Sampling(20, temperature, eos_ids=(), processors=(none_left,))))
    assert 0 < len(results[0].tokens) <= 7 and results[0].tokens == expected[: len(results[0].tokens)]


def test_processors_are_not_asked_behind_the_end(pair: Pair) -> None:
    """A grammar has nothing to say about what follows EOS, though the drafter drafts on."""
    full = greedy(pair[0], PROMPTS[0], 20, endless=True)
    eos = full[8]
    asked: list[list[int]] = []

    def grammar(ids: Tensor, scores: Tensor) -> Tensor:
        asked.append(ids[0, len(PROMPTS[0]) :].tolist())
        return scores

    result = Engine(*pair, TreeShape(4, 3, 12)).generate(
        [PROMPTS[0]], Sampling(20, eos_ids=(eos,), processors=(grammar,))
    )[0]
    end = full.index(eos) + 1
    assert result.tokens == full[:end] and result.finish == "stop"
    assert asked == [full[:n] for n in range(end)]  # each history of plain decoding once, no other
    assert max(result.accepted) >= 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ENGINES)
def test_an_interrupted_stream_leaves_nothing_behind(pair: Pair, name: str, temperature: float) -> None:
    """Closed, abandoned and broken off by the caller's exception: the next requests are answered as if alone."""
    engine = engine_of(pair, name)
    sampling = Sampling(20, temperature, eos_ids=(), processors=(alternate,))
    expected = engine.generate(PROMPTS, sampling)
    for steps_taken in (0, 1, 3):
        results = [Result(Inputs(prompt)) for prompt in PROMPTS]
        steps = engine.stream(results, sampling)
        for _ in range(steps_taken):
            next(steps)
        abandoned = engine.stream([Result(Inputs(prompt)) for prompt in PROMPTS], sampling)
        next(abandoned)
        steps.close()  # type: ignore[attr-defined]
        assert engine.generate(PROMPTS, sampling) == expected
        for result, whole in zip(results, expected):
            assert not result.finish and result.tokens == whole.tokens[: len(result.tokens)]
        with pytest.raises(ZeroDivisionError):
            for number, _ in enumerate(engine.stream([Result(Inputs(PROMPTS[0]))], sampling)):
                _ = 1 / (2 - number)
        assert engine.generate(PROMPTS, sampling) == expected
        next(abandoned)  # and two streams do not disturb each other


def test_whoever_takes_the_steps_may_end_an_answer(pair: Pair) -> None:
    engine, sampling = Engine(*pair, TreeShape(4, 3, 12)), Sampling(20, eos_ids=())
    results = [Result(Inputs(prompt)) for prompt in PROMPTS]
    for number, _ in enumerate(engine.stream(results, sampling)):
        if number == 2:
            results[1].finish, had = "enough", len(results[1].tokens)
    assert len(results[1].tokens) == had < 20
    for i in (0, 2):
        assert results[i].tokens == greedy(pair[0], PROMPTS[i], 20, endless=True)


@pytest.mark.parametrize("name", ["plain", "tree"])
@pytest.mark.parametrize("processors", [(), (alternate,)], ids=["free", "structured"])
def test_the_window_ends_answers_that_are_right_up_to_there(
    name: str, processors: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafter reaches beyond the window; the last token is the last that fits."""
    target = llama()
    drafter = random_drafter(target)
    monkeypatch.setattr(target, "context", 16)
    shape, rule = ENGINES[name]
    for length in (1, 9, 14, 15):
        prompt = list(range(20, 20 + length))
        (result,) = Engine(target, drafter if shape else None, shape, rule).generate(
            [prompt], Sampling(40, eos_ids=(), processors=processors)
        )
        output = target.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=16 - length,
            do_sample=False,
            eos_token_id=10**6,
            logits_processor=list(processors),
        )
        assert result.tokens == output[0, length:].tolist() and result.finish == "window"


@pytest.mark.parametrize("name", ENGINES)
def test_very_unequal_prompts_share_a_batch(pair: Pair, name: str) -> None:
    """One token beside two hundred; the short ones go on after the long one has met the window."""
    target = pair[0]
    prompts = [[70], [(7 * n) % 80 + 20 for n in range(230)], [40, 41], [(11 * n) % 80 + 20 for n in range(60)]]
    results = engine_of(pair, name).generate(prompts, Sampling(40, eos_ids=()))
    assert [r.finish for r in results] == ["length", "window", "length", "length"]
    for prompt, result in zip(prompts, results):
        assert result.tokens == greedy(target, prompt, min(40, 256 - len(prompt)), endless=True)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "top_p 0": ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
    "top_p 2": ({"top_p": 2.0}, "top_p must be"),
    "top_k": ({"top_k": -1}, "top_k must be 0"),
    "min_p": ({"min_p": 1.1}, "min_p must be between 0 and 1, not 1.1"),
    "penalty": ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0; 1 is none, not 0.0"),
    "no temperature": ({"temperature": float("nan")}, "temperature must be finite, not nan"),
    "hot": ({"temperature": float("inf")}, "temperature must be finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_settings_are_refused(name: str) -> None:
    options, reason = WRONG[name]
    with pytest.raises(VSDError, match=reason):
        Sampling(**options)


def test_requests_that_do_not_fit_are_refused(pair: Pair) -> None:
    engine = Engine(*pair)
    with pytest.raises(VSDError, match="logit_bias names token 128; the target has tokens 0 to 127"):
        engine.generate(PROMPTS, Sampling(4, logit_bias={5: 1.0, 128: 1.0}))
    with pytest.raises(VSDError, match="2 samplings for 3 prompts: give one, or one for each"):
        engine.generate(PROMPTS, [Sampling(4)] * 2)
    with pytest.raises(VSDError, match="prompt 2 has 300 tokens; the target's window is 256"):
        engine.generate([*PROMPTS[:2], [20] * 300], Sampling(4))
    with pytest.raises(VSDError, match="prompt 0 is empty"):
        engine.generate([[]], Sampling(0))
