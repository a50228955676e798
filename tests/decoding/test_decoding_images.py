"""Prompts with images: at temperature 0 the engine answers as the model's own `generate`, in trees and chains."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import along
import overfit
import seeing
import tiny
from vsd.data.generate import generate_batch
from vsd.decoding import Engine, Replay, Sampling
from vsd.drafters import FAMILIES
from vsd.errors import VSDError
from vsd.paths import Entries, TreeShape
from vsd.targets import Inputs, Padded, Target
from vsd.targets.images import Picture

LENGTH, K = 20, 3
PROMPTS: list[tuple[str, tuple[Picture, ...]]] = [
    ("hello # what", (seeing.picture(0, 24, 16),)),
    ("only text", ()),
    ("# or # now", (seeing.picture(1, 9, 30), seeing.picture(2))),
]


@torch.no_grad()
def generated(target: Target, text: str, pictures: tuple[Picture, ...], count: int) -> list[int]:
    """The answer of the model's own `generate` over its processor's inputs."""
    inputs = seeing.plain(target, text, *pictures)
    config = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 2, "eos_token_id": 10**6}
    return target.model.generate(**inputs, **config)[0, inputs["input_ids"].shape[1] :].tolist()


@cache
@torch.enable_grad()
def pair(family: str, kind: str = "eagle3") -> tuple[Target, Any]:
    """A target, and a drafter that knows its greedy answers to PROMPTS by heart."""
    target = seeing.target(family)
    drafter = overfit.random_drafter(target, size=tiny.VOCAB, family=kind).train().requires_grad_(True)
    prompts = [seeing.read(target, text, *pictures) for text, pictures in PROMPTS]
    answers = [generated(target, text, pictures, LENGTH) for text, pictures in PROMPTS]
    text = Padded.of([prompt.followed_by(answer) for prompt, answer in zip(prompts, answers)])
    entries = Entries.of(text, target.features(text, drafter.needs.layers).aux)
    roots = torch.tensor([[len(prompt.ids) - 1] for prompt in prompts]) + torch.arange(LENGTH - K)
    tokens = torch.stack([text.ids.gather(1, roots + 2 + k) for k in range(K)], dim=-1)  # [B, P, K]
    paths = along.paths(roots, tokens)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=5e-3)
    for _ in range(60):
        logits = drafter(entries, paths, lambda states, head: states @ head.T)
        loss = F.cross_entropy(logits.flatten(0, -2), tokens.movedim(-1, 0).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return target, drafter.eval().requires_grad_(False)


VISPEC = [(family, "vispec") for family in ("llava", "qwen3_vl", "idefics3")]


@pytest.mark.parametrize(("family", "kind"), [*((family, "eagle3") for family in seeing.FAMILIES), *VISPEC])
def test_greedy_is_generate(family: str, kind: str) -> None:
    """A batch of text, one image and two images, and each prompt alone; answers go on beyond what the drafter knows."""
    target, drafter = pair(family, kind)
    prompts = [seeing.read(target, text, *pictures) for text, pictures in PROMPTS]
    expected = [generated(target, text, pictures, LENGTH + 6) for text, pictures in PROMPTS]
    sampling = Sampling(LENGTH + 6, eos_ids=())
    for shape in (TreeShape(4, 3, 12), TreeShape.chain(3)):
        engine = Engine(target, drafter, shape)
        results = engine.generate(prompts, sampling)
        assert [result.tokens for result in results] == expected
        assert [engine.generate([prompt], sampling)[0].tokens for prompt in prompts] == expected
        assert sum(a >= 2 for result in results for a in result.accepted) >= 3
    assert [result.tokens for result in Engine(target).generate(prompts, sampling)] == expected


@pytest.mark.parametrize("kind", [name for name in FAMILIES if name != "eagle3"])
def test_other_drafters_decode_behind_images(kind: str) -> None:
    target, _ = pair(
        "llava" if kind == "lm" else "qwen3_vl"
    )  # Qwen3-VL's language model is none of AutoModelForCausalLM
    prompts = [seeing.read(target, text, *pictures) for text, pictures in PROMPTS]
    expected = [generated(target, text, pictures, LENGTH) for text, pictures in PROMPTS]
    engine = Engine(target, overfit.random_drafter(target, family=kind), TreeShape(3, 3, 8))
    assert [result.tokens for result in engine.generate(prompts, Sampling(LENGTH, eos_ids=()))] == expected


@pytest.mark.parametrize(("family", "kind"), [("llava", "eagle3"), ("qwen3_vl", "eagle3"), ("llava", "vispec")])
def test_replay_drafts_behind_images_what_the_engine_drafts(family: str, kind: str) -> None:
    target, drafter = pair(family, kind)
    prompts = [seeing.read(target, text, *pictures) for text, pictures in PROMPTS]
    results = Engine(target, drafter, TreeShape(3, 3, 8)).generate(prompts, Sampling(LENGTH, eos_ids=()))
    replayed = Replay(target, [(result.prompt, result.tokens) for result in results])(drafter, TreeShape(3, 3, 8))
    assert [result.delivered for result in replayed] == [result.delivered for result in results]
    end = -1 if kind == "vispec" else None  # its last pass accepts tokens behind the answer's end
    assert [result.accepted[:end] for result in replayed] == [result.accepted[:end] for result in results]


def test_training_text_is_generated_behind_images() -> None:
    target, _ = pair("qwen2_5_vl")
    prompts = [seeing.read(target, text, *pictures) for text, pictures in PROMPTS]
    answers = generate_batch(target, prompts, max_new_tokens=LENGTH, temperature=0, seed=0, stop_ids=())
    assert [answer.ids for answer in answers] == [generated(target, *prompt, LENGTH) for prompt in PROMPTS]


def test_generate_of_transformers_refuses_images() -> None:
    from vsd.decoding import speculative

    target, drafter = pair("llava")
    inputs = seeing.plain(target, *PROMPTS[0][:1], *PROMPTS[0][1])
    with pytest.raises(VSDError, match=r"give images to Engine\.generate"):
        target.model.generate(**inputs, max_new_tokens=4, custom_generate=speculative(target, drafter))


def test_other_pictures_get_other_answers() -> None:
    target, _ = pair("llava")
    one, other = (Engine(target).generate([seeing.read(target, "#", seeing.picture(n))], Sampling(12)) for n in (3, 4))
    assert one[0].tokens != other[0].tokens
    assert isinstance(one[0].prompt, Inputs)
