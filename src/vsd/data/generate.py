"""Plain decoding of many prompts at once: sampling from the target over its preallocated cache, no drafting.

Every row of a batch has its own length, and finished rows are removed from the batch. The answers are a function of
the seed and the batch alone, so a resumed run repeats them.

Legend: B prompts of a batch, N tokens of the longest prompt, h hidden size.
"""

import hashlib
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vsd.targets.cache import TreeCache
from vsd.targets.inputs import Inputs, Padded
from vsd.targets.sampling import choose
from vsd.targets.target import Target

_COMPACT = 8  # finished rows are removed once they are 1/8 of the batch: removing rows copies the cache


class Answer(NamedTuple):
    """Tokens that the target generated, with the end-of-turn token, and the reason why generation ended."""

    ids: list[int]
    finish: Literal["stop", "length"]


def generate_answers(
    target: Target,
    prompts: Sequence[Inputs],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[list[tuple[int, Answer]]]:
    """Answer all prompts. Yields for every batch its (index into `prompts`, answer) pairs."""
    for rows in plan_batches(prompts, batch_size):
        batch = [prompts[i] for i in rows]
        answers = generate_batch(
            target,
            batch,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=batch_seed(seed, batch),
        )
        yield list(zip(rows, answers, strict=True))


def plan_batches(prompts: Sequence[Inputs], batch_size: int) -> list[list[int]]:
    """Indices of `prompts` in batches of similar length."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@torch.inference_mode()
def generate_batch(
    target: Target,
    prompts: Sequence[Inputs],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_ids: Collection[int] | None = None,
) -> list[Answer]:
    """Answer the prompts of one batch, each up to `max_new_tokens` tokens or the first stop token.

    Args:
        stop_ids: tokens that end an answer; default the target's end tokens.
    """
    device = target.device
    stop_ids = target.eos_ids if stop_ids is None else stop_ids
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    cache, hidden = _prefill(target, prompts, max_new_tokens)
    rows = torch.arange(len(prompts), device=device)  # [B] the prompts still in the batch
    tokens = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.long, device=device)
    running = torch.ones_like(rows, dtype=torch.bool)
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
        hidden = _next(target, token, cache)
    return [_answer(row, stop_ids) for row in tokens.tolist()]


def _prefill(target: Target, prompts: Sequence[Inputs], max_new_tokens: int) -> tuple[TreeCache, Tensor]:
    """A cache that holds the prompts, and the hidden state of each one's last token, [B, h]."""
    padded = Padded.of(prompts, target.device)
    longest = min(padded.ids.shape[1] + max_new_tokens, target.context or sys.maxsize)
    cache = target.new_cache(len(prompts), longest)
    hidden = target.prefill(padded, cache).hidden  # [B, N, h]
    return cache, hidden[torch.arange(len(prompts), device=target.device), padded.lengths - 1]


def _next(target: Target, token: Tensor, cache: TreeCache) -> Tensor:
    """Append one token [B] to the cache of every row; its hidden state [B, h]."""
    itself = torch.ones(1, 1, 1, dtype=torch.bool, device=token.device)
    hidden = target.forward(token[:, None], cache.next[:, None], itself, cache).hidden[:, 0]
    cache.commit(torch.zeros_like(token)[:, None], torch.ones_like(token))
    return hidden


def batch_seed(seed: int, prompts: Sequence[Inputs]) -> int:
    """A seed for one batch: a function of the run's seed and the prompts' tokens."""
    return derive_seed(seed, [prompt.ids for prompt in prompts])


def derive_seed(*parts: object) -> int:
    """A seed that is a function of all parts and nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _answer(row: list[int], stop_ids: Collection[int]) -> Answer:
    ids = [token for token in row if token >= 0]
    return Answer(ids, "stop" if ids[-1] in stop_ids else "length")
