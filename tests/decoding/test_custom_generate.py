"""`model.generate(custom_generate=speculative(target, drafter))` is `model.generate`."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StopStringCriteria
from transformers.generation.stopping_criteria import ConfidenceCriteria

from overfit import PROMPTS, fluent_pair
from processors import alternate, positional
from vsd.decoding import speculative
from vsd.drafters.eagle3 import Eagle3Drafter
from vsd.errors import VSDError
from vsd.paths import TreeShape
from vsd.targets import Target

Pair = tuple[Target, Eagle3Drafter]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return fluent_pair(request.param)


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def left_padded(rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[2] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("options", [{"max_new_tokens": 20}, {"max_length": 16}], ids=str)
def test_greedy_equals_generate(pair: Pair, options: dict[str, int]) -> None:
    target, drafter = pair
    custom = speculative(target, drafter, TreeShape(4, 3, 12))
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        expected = target.model.generate(ids, do_sample=False, **options)
        assert torch.equal(target.model.generate(ids, do_sample=False, custom_generate=custom, **options), expected)


def test_left_padded_batches_equal_generate(pair: Pair) -> None:
    """One row ends early by EOS: it is padded as transformers pads it."""
    target, drafter = pair
    batch = left_padded(PROMPTS)
    options = {"max_new_tokens": 18, "do_sample": False, "pad_token_id": 3}
    free = target.model.generate(**batch, **options, eos_token_id=10**6)
    for eos in ([int(free[0, -9])], [int(free[1, -12]), int(free[2, -3])], [10**6]):
        options["eos_token_id"] = eos
        expected = target.model.generate(**batch, **options)
        custom = speculative(target, drafter)
        assert torch.equal(target.model.generate(**batch, **options, custom_generate=custom), expected)
    assert torch.equal(expected, free)


def test_no_eos_means_none(pair: Pair) -> None:
    """A model without an EOS token goes on past the tokenizer's, as in transformers."""
    target, drafter = pair
    before = target.model.generation_config.eos_token_id
    prompt = torch.tensor([PROMPTS[0]])
    first = int(target.model.generate(prompt, max_new_tokens=3, do_sample=False)[0, -1])
    name = target.tokenizer.eos_token
    target.model.generation_config.eos_token_id = None
    target.tokenizer.eos_token = target.tokenizer.convert_ids_to_tokens(first)
    try:
        expected = target.model.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=2)
        custom = {"custom_generate": speculative(target, drafter), "pad_token_id": 2}
        assert torch.equal(target.model.generate(prompt, max_new_tokens=10, do_sample=False, **custom), expected)
        assert expected.shape[1] == prompt.shape[1] + 10
    finally:
        target.model.generation_config.eos_token_id = before
        target.tokenizer.eos_token = name


def test_sampling_honours_temperature_and_the_global_seed(pair: Pair) -> None:
    target, drafter = pair
    custom = speculative(target, drafter)

    def sample(seed: int, temperature: float) -> list[int]:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "max_new_tokens": 12}
        return target.model.generate(torch.tensor([PROMPTS[0]]), custom_generate=custom, **options)[0].tolist()

    assert sample(0, 1.5) == sample(0, 1.5) != sample(1, 1.5)
    expected = target.model.generate(torch.tensor([PROMPTS[0]]), do_sample=False, max_new_tokens=12)[0].tolist()
    assert sample(0, 1e-4) == expected != sample(0, 1.5)


def test_streamer_receives_prompt_and_tokens(pair: Pair) -> None:
    target, drafter = pair
    recorder = Recorder()
    custom = speculative(target, drafter, streamer=recorder)
    output = target.model.generate(
        torch.tensor([PROMPTS[0]]), do_sample=False, max_new_tokens=9, custom_generate=custom
    )
    assert recorder.given[0] == PROMPTS[0] and recorder.ended == 1
    assert [token for put in recorder.given for token in put] == output[0].tolist()


PROCESSED: dict[str, dict[str, Any]] = {
    "greedy penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "defaults": {"do_sample": True},
    "top-p": {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 0},
    "warpers": {"do_sample": True, "temperature": 0.6, "typical_p": 0.9, "min_p": 0.01, "renormalize_logits": True},
    "n-grams": {"do_sample": False, "no_repeat_ngram_size": 2, "bad_words_ids": [[40], [41, 42]]},
    "lengths": {"do_sample": False, "min_new_tokens": 6, "forced_eos_token_id": 33, "begin_suppress_tokens": [74]},
    "structured": {"do_sample": True, "prefix_allowed_tokens_fn": lambda b, ids: [20 + b, int(ids[-1]) // 2 + 15, 30]},
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
    "encoder": {"do_sample": False, "encoder_repetition_penalty": 1.4},
    "own": {"do_sample": True, "logits_processor": [alternate, positional]},
}
ONE_BY_ONE = ["guidance", "encoder"]


def with_own_seeds(generate: Any, rows: int) -> Tensor:
    """`generate(row)` of every row, after `torch.manual_seed` of the seed that `speculative` draws for the row."""
    torch.manual_seed(5)
    seeds = torch.randint(2**31, (rows,)).tolist()
    outputs = []
    for row, seed in enumerate(seeds):
        torch.manual_seed(seed)
        outputs.append(generate(row)[0])
    torch.manual_seed(5)
    return torch.stack(outputs)


@pytest.mark.parametrize("name", PROCESSED)
def test_processors_are_honoured(pair: Pair, name: str) -> None:
    """Greedy and sampled answers are those of `generate`; the calls are the same, so states and row numbers work."""
    target, drafter = pair
    options = {"max_new_tokens": 20, "eos_token_id": 10**6, "pad_token_id": 2, **PROCESSED[name]}
    custom = speculative(target, drafter, TreeShape(4, 3, 12))
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        expected = with_own_seeds(lambda row, ids=ids: target.model.generate(ids, **options), 1)
        assert torch.equal(target.model.generate(ids, **options, custom_generate=custom), expected)


@pytest.mark.parametrize("name", sorted(set(PROCESSED) - set(ONE_BY_ONE)))
def test_processors_are_honoured_in_left_padded_batches(pair: Pair, name: str) -> None:
    """Processors see the padding, as in `generate`, and which row they are asked for."""
    target, drafter = pair
    batch = left_padded(PROMPTS)
    options = {"max_new_tokens": 20, "eos_token_id": 10**6, "pad_token_id": 2, **PROCESSED[name]}

    def one(row: int) -> Tensor:
        mine = dict(options)
        if allowed := options.get("prefix_allowed_tokens_fn"):
            mine["prefix_allowed_tokens_fn"] = lambda _, ids: allowed(row, ids)
        return target.model.generate(**{key: value[row : row + 1] for key, value in batch.items()}, **mine)

    expected = with_own_seeds(one, len(PROMPTS))
    if not options["do_sample"]:
        assert torch.equal(target.model.generate(**batch, **options), expected)
    found = target.model.generate(**batch, **options, custom_generate=speculative(target, drafter))
    assert torch.equal(found, expected)


def test_stopping_criteria_are_honoured(pair: Pair) -> None:
    """Stop strings, and a criterion of one's own that is asked at every token; each row stops by itself."""
    target, drafter = pair
    batch = left_padded(PROMPTS)
    options = {"max_new_tokens": 18, "do_sample": False, "pad_token_id": 3, "eos_token_id": 10**6}
    free = target.model.generate(**batch, **options)
    width = batch["input_ids"].shape[1]
    stop = str(target.tokenizer.decode(free[0, width + 5 : width + 7]))
    own = lambda ids, scores: torch.tensor([int(row[-1]) == int(free[1, -4]) for row in ids])  # noqa: E731
    options["stopping_criteria"] = [StopStringCriteria(target.tokenizer, [stop]), own]
    expected = target.model.generate(**batch, **options)
    recorder = Recorder()
    custom = speculative(target, drafter, TreeShape(4, 3, 12), streamer=recorder)
    assert torch.equal(target.model.generate(**batch, **options, custom_generate=custom), expected)
    assert not torch.equal(expected, free)
    answer = [token for put in recorder.given[1:] for token in put]
    assert answer == expected[0, width : width + len(answer)].tolist() and len(answer) < 18
    options |= {"stopping_criteria": None, "max_time": -1.0, "custom_generate": speculative(target, drafter)}
    assert torch.equal(
        target.model.generate(**batch, **options), free[:, : width + 1]
    )  # out of time after the first token


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"do_sample": False, "num_beams": 2}, "beam search"),
        ({"do_sample": True, "num_return_sequences": 2}, "one sequence"),
        ({"do_sample": False, "return_dict_in_generate": True}, "tokens only"),
        ({"do_sample": False, "stopping_criteria": [ConfidenceCriteria(0.4)]}, "ConfidenceCriteria"),
        *((PROCESSED[name], "one prompt a time") for name in ONE_BY_ONE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_honoured_is_refused(pair: Pair, options: dict, reason: str) -> None:
    target, drafter = pair
    custom = speculative(target, drafter)
    with pytest.raises(VSDError, match=reason):
        target.model.generate(**left_padded(PROMPTS), max_new_tokens=5, custom_generate=custom, **options)
