"""Drafters that know a few greedy answers of a tiny target by heart, so that long paths are accepted."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

import along
import seeing
import tiny
from architectures import ARCHITECTURES
from vsd.drafters import draft_vocabulary, new_drafter
from vsd.drafters.lattice import logits
from vsd.targets import Target

PROMPTS = [[40, 41, 42, 43, 60], [70], [99, 20, 33, 57, 80, 81, 26, 64, 90]]


def random_drafter(target: Target, size: int = 100, seed: int = 0, family: str = "eagle3") -> Any:
    torch.manual_seed(seed)
    common = draft_vocabulary(torch.randperm(target.vocab_size)[:size], target.vocab_size, size)
    return new_drafter(target, common, family, initializer_range=0.2).eval().requires_grad_(False)


@torch.no_grad()
def greedy(target: Target, prompt: list[int], count: int, *, endless: bool = False) -> list[int]:
    """What `model.generate` answers; with `endless`, no token ends the answer."""
    end = {"eos_token_id": 10**6} if endless else {}
    answer = target.model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=2, **end)
    return answer[0, len(prompt) :].tolist()


@cache
@torch.enable_grad()
def fluent_pair(name: str, family: str = "eagle3", length: int = 24, steps: int = 80, K: int = 3) -> tuple[Target, Any]:
    """A target, and a drafter trained on its greedy answers to PROMPTS at every position where decoding drafts."""
    target = ARCHITECTURES[name]() if name in ARCHITECTURES else seeing.target(name)
    drafter = random_drafter(target, size=tiny.VOCAB, family=family).train().requires_grad_(True)
    rows = [prompt + greedy(target, prompt, length, endless=True) for prompt in PROMPTS]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # [B, T + 1]
    roots = torch.tensor([[len(prompt) - 1] for prompt in PROMPTS]) + torch.arange(length - K)  # [B, Q]
    path = torch.stack([ids.gather(1, roots + 1 + k) for k in range(K + 1)])  # [K + 1, B, Q]
    entries = along.entries(target, ids[:, :-1], drafter.needs.layers)._replace(next_ids=ids[:, 1:])
    paths = along.paths(roots, path[1:].permute(1, 2, 0))
    trained = [weight for weight in drafter.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=5e-3)
    for _ in range(steps):
        found = drafter(entries, paths, _every_logit)
        loss = F.cross_entropy(found.flatten(0, -2), path[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return target, drafter.eval().requires_grad_(False)


def _every_logit(states: torch.Tensor, head: Any) -> torch.Tensor:
    """Logits [..., Vd]; on a lattice of all tokens, so that every token has a gradient."""
    return logits(states, head if isinstance(head, torch.Tensor) else head._replace(top_k=len(head.unary)))
