"""The target answers many prompts at once: plain sampling over the preallocated cache, no drafting.

Rows of a batch keep their own lengths, so nothing is padded on the left, and rows that have finished leave
the batch instead of being computed to its end. Draws are a function of the seed and the batch alone: the same
batch gives the same answers in a resumed run.

Legend: B prompts of a batch, N longest prompt, V vocabulary.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from vsd.targets.inputs import Inputs, Padded
from vsd.targets.sampling import choose
from vsd.targets.target import Target

_COMPACT = 8  # finished rows are dropped once they are 1/8 of the batch: dropping copies the cache


class Answer(NamedTuple):
    """Tokens the target produced, the end-of-turn token included, and why it stopped."""

    ids: list[int]
    finish: Literal["stop", "length"]


def generate_answers(
    target: Target,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[list[tuple[int, Answer]]]:
    """Answer all prompts; yields, batch by batch, (index into `prompts`, answer) for every row."""
    for rows in plan_batches(prompts, batch_size):
        batch = [prompts[i] for i in rows]
        answers = generate_batch(
            target,
            batch,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=derive_seed(seed, batch),
        )
        yield list(zip(rows, answers, strict=True))


def plan_batches(prompts: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """Indices of `prompts` in batches of like length."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@torch.inference_mode()
def generate_batch(
    target: Target,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_ids: Collection[int] | None = None,
) -> list[Answer]:
    """Answer the prompts of one batch, each up to `max_new_tokens` tokens or the first stop token."""
    device = target.device
    stops = torch.tensor(sorted(target.eos_ids if stop_ids is None else stop_ids), dtype=torch.long, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    inputs = Padded.of([Inputs(ids) for ids in prompts], device)
    cache = target.new_cache(len(prompts), inputs.ids.shape[1] + max_new_tokens)
    rows = torch.arange(len(prompts), device=device)  # [B] the prompts still in the batch
    hidden = target.prefill(inputs, cache).hidden[rows, inputs.lengths - 1]  # [B, h]
    tokens = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.long, device=device)
    running = torch.ones_like(rows, dtype=torch.bool)
    myself = torch.ones(1, 1, 1, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        token = choose(target.logits(hidden), temperature, generator)  # [B]
        tokens[rows[running], step] = token[running]
        running &= ~torch.isin(token, stops)
        alive = int(running.sum())
        if alive == 0 or step == max_new_tokens - 1:
            break
        if (len(rows) - alive) * _COMPACT >= len(rows):
            keep = running.nonzero()[:, 0]
            cache.select(keep)
            rows, token, running = rows[keep], token[keep], running[keep]
        hidden = target.forward(token[:, None], cache.next[:, None], myself, cache).hidden[:, 0]
        cache.commit(torch.zeros_like(rows)[:, None], torch.ones_like(rows))
    return [_answer(row, target.eos_ids if stop_ids is None else stop_ids) for row in tokens.tolist()]


def derive_seed(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _answer(row: list[int], stops: Collection[int]) -> Answer:
    ids = [token for token in row if token >= 0]
    return Answer(ids, "stop" if ids[-1] in stops else "length")
