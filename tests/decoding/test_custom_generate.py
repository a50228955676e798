"""`model.generate(custom_generate=speculative(target, drafter))` is `model.generate`."""

import pytest
import torch
from torch import Tensor

from overfit import PROMPTS, fluent_pair
from vsd.decoding import speculative
from vsd.drafters import Eagle3Drafter
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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"do_sample": True, "top_p": 0.9, "top_k": 0}, "TopPLogitsWarper"),
        ({"do_sample": True, "top_k": 5}, "TopKLogitsWarper"),
        ({"do_sample": False, "repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor"),
        ({"do_sample": False, "max_time": 9.0}, "MaxTimeCriteria"),
        ({"do_sample": False, "num_beams": 2}, "beam search"),
        ({"do_sample": True, "top_k": 0, "num_return_sequences": 2}, "one sequence"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_change_the_output_is_refused(pair: Pair, options: dict, reason: str) -> None:
    target, drafter = pair
    with pytest.raises(VSDError, match=reason):
        target.model.generate(
            torch.tensor([PROMPTS[0]]), max_new_tokens=5, custom_generate=speculative(target, drafter), **options
        )
