"""Losslessness on a real model, SmolLM2-135M-Instruct in float32: tokens at temperature 0, their law above."""

import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

import along
from goodness import p_value
from vsd.data import prompt_inputs, read_conversations
from vsd.decoding import Engine, Sampling
from vsd.decoding.statistics import acceptance_length
from vsd.drafters import load_drafter
from vsd.drafters.where import EMBEDDED
from vsd.paths import TreeShape
from vsd.targets import Target, load_target

pytestmark = pytest.mark.real

TEXT = Path(str(files("vsd") / "assets" / "smollm2-135m-text.jsonl.gz"))
PROMPTS, LENGTH = 12, 48


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    torch.set_num_threads(os.cpu_count() or 1)
    yield load_target(dtype="float32", device="cpu")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def drafter(target: Target) -> Any:
    """The trained drafter of the package."""
    return load_drafter(EMBEDDED, target)


@pytest.fixture(scope="module")
def prompts(target: Target) -> list[list[int]]:
    """First user turns, by length, so that batches are even."""
    found = []
    for conversation in read_conversations(TEXT, need_answer=False):
        ids = prompt_inputs(target.tokenizer, [m for m in conversation.messages if m["role"] == "user"][:1]).ids
        if len(ids) <= 120:
            found.append(ids)
        if len(found) == PROMPTS:
            break
    assert len(found) == PROMPTS
    return sorted(found, key=len)


@torch.inference_mode()
def transformers_greedy(target: Target, prompts: list[list[int]]) -> list[list[int]]:
    """Answers of left-padded batches by `model.generate`, cut behind EOS."""
    pad = target.eos_ids[0]
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    output = target.model.generate(ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False, pad_token_id=pad)
    answers = [row[longest:].tolist() for row in output]
    return [answer[: answer.index(pad) + 1] if pad in answer else answer for answer in answers]


def test_greedy_is_generate(target: Target, drafter: Any, prompts: list[list[int]]) -> None:
    """12 prompts, up to 48 tokens each, a tree of 8 nodes: not one token differs."""
    engine = Engine(target, drafter, TreeShape(4, 3, 8))
    results = engine.generate(prompts, Sampling(LENGTH))
    assert [r.tokens for r in results] == transformers_greedy(target, prompts)
    assert sum(len(r.tokens) for r in results) > 0.5 * PROMPTS * LENGTH
    assert acceptance_length(results) > 1.5


@pytest.mark.parametrize("rule", ["plain", "tree", "rejection"])
def test_samples_have_the_targets_law(target: Target, drafter: Any, rule: str) -> None:
    """χ² of three new tokens, n = 200 a rule, false alarm 1e-4 a rule (a third of it a token), fixed seed.

    The first token against its law; then the next ones, given that those before are the commonest. Bins are the
    likeliest tokens (expected 5 times or more) and the rest.
    """
    prompt = target.tokenizer.encode("Once upon a time")
    shape, verification = {
        "plain": (None, "auto"),
        "tree": (TreeShape(3, 3, 8), "auto"),
        "rejection": (TreeShape.chain(3), "rejection"),
    }[rule]
    engine = Engine(target, drafter if shape else None, shape, verification)
    answers = []
    for first in range(0, 200, 100):
        requests = [Sampling(3, 1.0, eos_ids=(), seed=first + n) for n in range(100)]
        answers += [r.tokens for r in engine.generate([prompt] * 100, requests)]
    prefix: list[int] = []
    for _ in range(3):  # the law of each new token given the commonest ones before it
        agreeing = [answer for answer in answers if answer[: len(prefix)] == prefix]
        assert len(agreeing) >= 20
        ids = torch.tensor([prompt + prefix])
        law = target.logits(target.features(along.text(ids)).hidden[0, -1]).double().softmax(-1)
        counts = torch.bincount(torch.tensor([a[len(prefix)] for a in agreeing]), minlength=len(law))
        assert p_value(counts, law) > 1e-4 / 3
        prefix.append(int(counts.argmax()))
