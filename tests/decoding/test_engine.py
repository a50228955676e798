"""The engine at temperature 0 is greedy decoding, token for token; and how answers end and are accounted for."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import GPT2Config

import along
import seeing
from architectures import ARCHITECTURES, SIZES, build, llama
from overfit import PROMPTS, fluent_pair, greedy, random_drafter
from vsd.data import generate
from vsd.decoding import Engine, Replay, Result, Sampling
from vsd.drafters import FAMILIES, lattice
from vsd.errors import VSDError
from vsd.paths import TreeShape
from vsd.targets import Inputs, Target
from vsd.targets.cache import Slots

LENGTH = 24
Pair = tuple[Target, Any]


OTHERS = [("llava" if family == "vispec" else "llama", family) for family in FAMILIES if family != "eagle3"]


@pytest.fixture(scope="module", params=[*((name, "eagle3") for name in sorted(ARCHITECTURES)), *OTHERS], ids="-".join)
def pair(request: pytest.FixtureRequest) -> Pair:
    return fluent_pair(*request.param)


@pytest.fixture(scope="module")
def expected(pair: Pair) -> list[list[int]]:
    """What `generate` answers to PROMPTS, beyond what the drafter learnt: paths are rejected, too."""
    return [greedy(pair[0], prompt, LENGTH + 8, endless=True) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def fluent() -> Pair:
    """A target and a drafter whose paths it accepts."""
    return fluent_pair("llama")


def check_accounts(result: Result, depth: int) -> None:
    assert len(result.accepted) == len(result.delivered)
    assert sum(result.delivered) + 1 == len(result.tokens)
    assert all(1 <= d <= a + 1 for a, d in zip(result.accepted, result.delivered))
    assert all(d == a + 1 for a, d in zip(result.accepted[:-1], result.delivered[:-1]))
    assert all(0 <= a <= depth for a in result.accepted)


def test_caches_hold_no_more_than_the_window_and_a_tree(fluent: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = fluent
    assert target.context is not None
    shape, capacities, new, begin = TreeShape(4, 3, 12), [], Target.new_cache, type(drafter).begin

    def new_cache(self: Target, rows: int, capacity: int) -> Any:
        capacities.append(capacity)
        return new(self, rows, capacity)

    def begun(self: Any, prompt: Any, aux: Any, root: Any, capacity: int) -> Any:
        capacities.append(capacity)
        return begin(self, prompt, aux, root, capacity)

    monkeypatch.setattr(Target, "new_cache", new_cache)
    monkeypatch.setattr(type(drafter), "begin", begun)
    next(Engine(target, drafter, shape).stream([Result(Inputs(PROMPTS[0]))], Sampling(10**5)))
    generate._prefill(target, [Inputs(PROMPTS[0])], 10**5)
    assert len(capacities) == 3
    assert max(capacities) <= target.context + shape.largest + 1 + shape.depth * shape.top_k


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_of_an_answer_are_free_when_it_is_complete(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector, also if nobody reads the answer to its end."""
    target = seeing.target("llava") if family == "vispec" else llama()
    drafter, alive = random_drafter(target, family=family), []
    store_for = Slots.store_for

    def watched(slots: Slots, *states: Any) -> Any:
        alive.append(weakref.ref(store := store_for(slots, *states)))
        return store

    monkeypatch.setattr(Slots, "store_for", watched)
    engine = Engine(target, drafter, TreeShape(3, 2, 6))
    gc.disable()
    try:
        engine.generate([Inputs(PROMPTS[0])], Sampling(6))
        next(engine.stream([Result(Inputs(PROMPTS[0]))], Sampling(6)))
        generate.generate_batch(target, [Inputs(PROMPTS[0])], max_new_tokens=6, temperature=0.0, seed=0)
        assert len(alive) >= 3 and not any(one() for one in alive)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "shape",
    [TreeShape(4, 3, 12), TreeShape(4, 3, 12, 0.05), TreeShape(4, 3, 12, 0.05, 6), TreeShape.chain(3), None],
    ids=str,
)
def test_greedy_is_generate(pair: Pair, expected: list[list[int]], shape: TreeShape | None) -> None:
    """Ragged prompts in one batch, one alone; the drafter knows these answers, so paths are really accepted."""
    target, drafter = pair
    engine = Engine(target, None if shape is None else drafter, shape)
    sampling = Sampling(LENGTH + 8, eos_ids=())
    together = engine.generate(PROMPTS, sampling)
    alone = engine.generate(PROMPTS[:1], sampling)
    assert [r.tokens for r in together] == expected
    assert alone[0].tokens == expected[0]
    for result in together + alone:
        check_accounts(result, 0 if shape is None else shape.depth)
    accepted = [a for r in together for a in r.accepted]
    if shape is None:
        assert not any(accepted)
    else:
        assert sum(a >= 2 for a in accepted) >= 3 and min(accepted) < shape.depth


@pytest.mark.parametrize(
    "pair_of", [("llama", "eagle3"), ("gemma3", "eagle3"), ("phi", "eagle3"), *OTHERS], ids="-".join
)
@torch.no_grad()
def test_every_pass_drafts_what_the_training_pass_would(pair_of: tuple[str, str]) -> None:
    """Accepted counts equal those of a reference that drafts each chain anew from plain features of the whole text."""
    target, drafter = fluent_pair(*pair_of)
    ids, K, length = drafter.vocabulary.ids, 3, LENGTH + 8
    results = Engine(target, drafter, TreeShape.chain(K)).generate(PROMPTS, Sampling(length, eos_ids=()))
    for prompt, result in zip(PROMPTS, results):
        text = torch.tensor(prompt + result.tokens)
        entries = along.entries(target, text[None], drafter.needs.layers)
        expected, root = [], len(prompt)  # place of the token decided last
        while root < len(text) - 1:
            path = [int(text[root])]
            for k in range(K):
                paths = along.paths(torch.tensor([[root - 1]]), torch.tensor([[[*path[1:], *[0] * (K - k)]]]))
                best = drafter(entries, paths, lambda states, head, k=k: lattice.logits(states[k, 0, 0], head).argmax())
                path.append(int(ids[best]))
            rest = text[root + 1 : root + 1 + K].tolist()
            agree = next((k for k, (a, b) in enumerate(zip(path[1:], rest)) if a != b), len(rest))
            expected.append(agree)
            root += agree + 1
        assert result.accepted[:-1] == expected[:-1]  # the last pass may accept beyond the end of the answer


@pytest.mark.parametrize("shape", [TreeShape(5, 4, 20), TreeShape.chain(2)], ids=["tree", "chain"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_an_ignorant_drafter_changes_nothing(name: str, shape: TreeShape) -> None:
    target = ARCHITECTURES[name]()
    results = Engine(target, random_drafter(target), shape).generate(PROMPTS, Sampling(12))
    assert [r.tokens for r in results] == [greedy(target, prompt, 12) for prompt in PROMPTS]


def test_text_that_repeats_is_looked_up(fluent: Pair) -> None:
    """With a drafter that knows nothing, and with none: what is accepted then was copied. No token is different."""
    target = fluent[0]
    prompt = PROMPTS[0] + greedy(target, PROMPTS[0], 20, endless=True)
    prompt = prompt + prompt[: len(PROMPTS[0]) + 4]
    expected = greedy(target, prompt, 24, endless=True)
    for drafter, shape in ((random_drafter(target), TreeShape(2, 2, 3, lookup=6)), (None, TreeShape(lookup=6))):
        result = Engine(target, drafter, shape).generate([prompt], Sampling(24, eos_ids=()))[0]
        assert result.tokens == expected
        assert sum(result.accepted) > 0
    with pytest.raises(VSDError, match="lookup"):
        Engine(*fluent, TreeShape(2, 1, 3, lookup=3), "rejection")


def test_rejection_verification_at_temperature_zero_is_greedy(fluent: Pair) -> None:
    results = Engine(*fluent, TreeShape.chain(3), "rejection").generate(PROMPTS, Sampling(LENGTH))
    assert [r.tokens for r in results] == [greedy(fluent[0], prompt, LENGTH) for prompt in PROMPTS]
    assert max(a for r in results for a in r.accepted) >= 2


def test_every_length_is_exact(fluent: Pair) -> None:
    """max_new_tokens cuts accepted paths wherever it falls; tokens up to there do not change."""
    engine = Engine(*fluent, TreeShape(4, 3, 12))
    full = [greedy(fluent[0], prompt, 9, endless=True) for prompt in PROMPTS]
    for count in range(10):
        results = engine.generate(PROMPTS, Sampling(count, eos_ids=()))
        assert [r.tokens for r in results] == [tokens[:count] for tokens in full]
        assert all(r.finish == "length" for r in results)
        if count:
            for result in results:
                check_accounts(result, 4)
    assert engine.generate(PROMPTS, Sampling(1))[0].delivered == []


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 11])
def test_answers_end_at_eos(fluent: Pair, at: int) -> None:
    engine = Engine(*fluent, TreeShape(4, 3, 12))
    full = [greedy(fluent[0], prompt, LENGTH, endless=True) for prompt in PROMPTS]
    eos = full[0][at]
    results = engine.generate(PROMPTS, Sampling(LENGTH, eos_ids=(eos, 127)))
    for result, tokens in zip(results, full):
        ends = [i for i, token in enumerate(tokens) if token in (eos, 127)]
        assert result.tokens == (tokens[: ends[0] + 1] if ends else tokens)
        assert result.finish == ("stop" if ends else "length")
        check_accounts(result, 4)


def test_eos_defaults_to_the_targets_own(fluent: Pair) -> None:
    target, drafter = fluent
    full = greedy(target, PROMPTS[0], LENGTH, endless=True)
    before = target.eos_ids
    target.eos_ids = (full[5],)
    try:
        result = Engine(target, drafter).generate([PROMPTS[0]], Sampling(LENGTH))[0]
    finally:
        target.eos_ids = before
    assert result.finish == "stop" and result.tokens == full[: full.index(full[5]) + 1]


def test_stop_strings_end_answers_at_the_token_that_completes_one(fluent: Pair) -> None:
    target, drafter = fluent
    full = greedy(target, PROMPTS[0], LENGTH, endless=True)
    texts = [target.tokenizer.decode([token]) for token in full]
    start = next(i for i in range(2, 20) if all(len(t) == 1 for t in texts[i : i + 2]))
    stop = "".join(texts[start : start + 2])
    end = next(i for i in range(1, LENGTH) if target.tokenizer.decode(full[: i + 1]).endswith(stop))
    result = Engine(target, drafter).generate([PROMPTS[0]], Sampling(LENGTH, eos_ids=(), stop=("never", stop)))[0]
    assert result.tokens == full[: end + 1] and result.finish == "stop"
    check_accounts(result, 5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_end_at_the_window(kind: str) -> None:
    """Also with learned positions, of which none lie beyond the window."""
    sizes = {**SIZES, "max_position_embeddings": 16}
    target = build(GPT2Config(**sizes)) if kind == "gpt2" else llama()
    target.context = 16
    drafter = random_drafter(target)
    prompts = [list(range(20, 20 + n)) for n in (15, 12, 3)]
    results = Engine(target, drafter, TreeShape(6, 3, 20)).generate(prompts, Sampling(10, eos_ids=()))
    for prompt, result in zip(prompts, results):
        room = min(10, 16 - len(prompt))
        assert result.tokens == greedy(target, prompt, room, endless=True)
        assert result.finish == ("length" if room == 10 else "window")


def test_impossible_prompts_are_refused(fluent: Pair) -> None:
    engine = Engine(*fluent)
    with pytest.raises(VSDError, match="prompt 1 is empty"):
        engine.generate([[20], []], Sampling(4))
    with pytest.raises(VSDError, match="prompt 0 has 256 tokens; the target's window is 256"):
        engine.generate([[20] * 256], Sampling(4))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streaming_yields_the_same_tokens(fluent: Pair, temperature: float) -> None:
    engine = Engine(*fluent, TreeShape(4, 3, 12))
    sampling = Sampling(15, temperature, eos_ids=(115,), seed=5)
    expected = engine.generate(PROMPTS, sampling)
    results = [Result(Inputs(prompt)) for prompt in PROMPTS]
    streamed: list[list[int]] = [[] for _ in PROMPTS]
    steps = 0
    for step in engine.stream(results, sampling):
        steps += 1
        for i, tokens in step.tokens.items():
            assert tokens
            streamed[i] += tokens
            assert results[i].tokens == streamed[i]
        assert min(step.draft, step.verify, step.commit) >= 0
    assert streamed == [r.tokens for r in expected]
    assert steps == 1 + max(len(r.delivered) for r in expected)


def test_seeds_decide_samples(fluent: Pair) -> None:
    engine = Engine(*fluent, TreeShape(4, 3, 12))
    draw = lambda seed: [r.tokens for r in engine.generate(PROMPTS, Sampling(12, 1.0, seed=seed))]  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def test_a_drafter_of_another_target_is_refused(fluent: Pair) -> None:
    _, drafter = fluent
    other = llama()
    with torch.no_grad():
        other.model.lm_head.weight.mul_(2.0)
    with pytest.raises(VSDError, match="another target: fingerprint"):
        Engine(Target(other.model, other.tokenizer), drafter)


def test_wrong_settings_are_refused(fluent: Pair) -> None:
    with pytest.raises(VSDError, match="unknown verification 'typical': choose auto or rejection"):
        Engine(*fluent, verification="typical")
    with pytest.raises(VSDError, match="top_k 1"):
        Engine(*fluent, TreeShape(3, 2, 5), "rejection")
    for wrong in ({"max_new_tokens": -1}, {"temperature": -0.5}):
        with pytest.raises(VSDError, match="negative"):
            Sampling(**wrong)


@pytest.mark.parametrize(
    ("shape", "temperature", "rule"), [(TreeShape(3, 3, 8), 0.0, "auto"), (TreeShape.chain(3), 1.0, "rejection")]
)
def test_a_drafter_that_computes_nan_is_an_error(shape: TreeShape, temperature: float, rule: str) -> None:
    """Not a wrong answer: among NaN scores a tree may lose a node's parent."""
    target, drafter = copy.deepcopy(fluent_pair("llama"))  # which other tests use, too
    torch.nn.init.constant_(drafter.midlayer.mlp.down_proj.weight, float("nan"))
    with pytest.raises(VSDError, match="NaN"):
        Engine(target, drafter, shape, rule).generate(PROMPTS, Sampling(8, temperature))


@pytest.mark.parametrize(
    "shape",
    [
        TreeShape(4, 3, 12),
        TreeShape(2, 4, 6),
        TreeShape(4, 3, 12, 0.02),
        TreeShape(2, 3, 6, 0.1, 5),
        TreeShape.chain(3),
    ],
    ids=str,
)
def test_replayed_answers_deliver_what_decoding_delivers(pair: Pair, shape: TreeShape) -> None:
    """Pass by pass, for answers of any length: cut short, ended by EOS, a single token."""
    target, drafter = pair
    results = []
    for length in (1, 2, 9, LENGTH + 8):
        results += Engine(target, drafter, shape).generate(PROMPTS, Sampling(length))
    if shape.p_min:  # trees of a batch are as big as its biggest, so compare with requests one by one
        results = [
            Engine(target, drafter, shape).generate([r.prompt], Sampling(max(1, len(r.tokens))))[0] for r in results
        ]
    texts = [(result.prompt, result.tokens) for result in results]
    found = Replay(target, texts)(drafter, shape)
    if shape.p_min:
        assert [r.trees for r in found] == [r.trees for r in results]
        assert len({nodes for r in found for nodes, _ in r.trees}) > 1
    assert [r.delivered for r in found] == [r.delivered for r in results]
    assert [r.accepted[:-1] for r in found] == [r.accepted[:-1] for r in results]
    assert max(d for r in found for d in r.delivered) > 2
    assert Replay(target, [])(drafter, shape) == []


def test_drawn_answers_are_replayed_too(fluent: Pair) -> None:
    """By rule target, pass by pass: what the target draws does not depend on what is drafted."""
    target, drafter = fluent
    shape, samplings = TreeShape(4, 3, 12), [Sampling(LENGTH, 1.0, seed=i) for i in range(len(PROMPTS))]
    results = Engine(target, drafter, shape).generate(PROMPTS, samplings)
    found = Replay(target, [(r.prompt, r.tokens) for r in results], 1.0)(drafter, shape)
    assert [r.delivered for r in found] == [r.delivered for r in results]
    assert max(d for r in found for d in r.delivered) > 1


def test_rejection_is_replayed_in_law(fluent: Pair) -> None:
    """Plain decoding's answers, replayed, against decoding by rejection: accepted tokens of the first pass.

    Difference of two means of some 400 each, within 4.5 standard errors: a false alarm in 150,000 runs.
    """
    target, drafter = fluent
    shape, temperature = TreeShape.chain(3), 1.3
    prompts = PROMPTS * (400 // len(PROMPTS))
    samplings = [Sampling(6, temperature, (), seed=i) for i in range(len(prompts))]
    decoded = Engine(target, drafter, shape, "rejection").generate(prompts, samplings)
    plain = Engine(target).generate(prompts, samplings)
    replay = Replay(target, [(r.prompt, r.tokens) for r in plain], temperature)
    found = replay(drafter, shape, "rejection", seed=1)
    for number in range(2):
        theirs, mine = (
            torch.tensor([r.accepted[number] for r in results if len(r.accepted) > number], dtype=torch.float64)
            for results in (decoded, found)
        )
        error = (theirs.var() / len(theirs) + mine.var() / len(mine)).sqrt()
        assert abs(theirs.mean() - mine.mean()) < 4.5 * error
        assert 0.2 < float(mine.mean()) < 2.8
    assert [r.accepted for r in replay(drafter, shape, "rejection", seed=1)] == [r.accepted for r in found]
    assert [r.accepted for r in replay(drafter, shape, "rejection", seed=2)] != [r.accepted for r in found]


def test_what_cannot_be_replayed_is_refused(fluent: Pair) -> None:
    target, drafter = fluent
    for temperature, shape in [(0.0, TreeShape.chain(3)), (1.0, TreeShape(3, 2, 5)), (1.0, TreeShape.chain(3, 0.1))]:
        with pytest.raises(VSDError, match="plain chains"):
            Replay(target, [], temperature)(drafter, shape, "rejection")
