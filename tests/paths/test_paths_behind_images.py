"""E-steps behind images: paths continued or scored there have the log p of the model's own forward."""

import pytest
import torch

import seeing
from vsd.paths import continue_text, score_paths
from vsd.targets import Padded, Target

ROWS = [("a # b", (seeing.picture(0, 24, 16),)), ("# then #", (seeing.picture(1), seeing.picture(2, 9, 30)))]
TAIL = [40, 41, 42, 43, 44, 45]
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@torch.no_grad()
def log_p(target: Target, row: int, more: list[int], path: list[int]) -> torch.Tensor:
    """Of every token of a path behind a prompt and more text, by the model itself."""
    text, pictures = ROWS[row]
    logits = target.model(**seeing.plain(target, text, *pictures, more=[*more, *path])).logits[0]
    return logits[-len(path) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(path)[:, None])[:, 0]


@pytest.fixture(scope="module", params=["llava", "qwen3_vl", "gemma3"])
def target(request: pytest.FixtureRequest) -> Target:
    return seeing.target(request.param)


def texts(target: Target) -> tuple[Padded, list[int]]:
    prompts = [seeing.read(target, text, *pictures) for text, pictures in ROWS]
    return Padded.of([prompt.followed_by(TAIL) for prompt in prompts]), [len(prompt.ids) for prompt in prompts]


def test_scored_paths(target: Target) -> None:
    text, lengths = texts(target)
    behind = torch.tensor([1, 1, 4])  # tokens of the tail that a path's root has seen
    roots = torch.tensor(lengths)[:, None] + behind - 2
    tokens = torch.tensor([[[50, 51, 52], [50, 53, 54], [60, 61, 62]]] * 2)
    found = score_paths(target, text, roots, tokens)
    for b in range(2):
        for p in range(3):
            expected = log_p(target, b, TAIL[: int(behind[p])], tokens[b, p].tolist())
            torch.testing.assert_close(found.log_p[b, p], expected, **CLOSE)


def test_continued_texts(target: Target) -> None:
    text, lengths = texts(target)
    behind = torch.tensor([1, 4])
    roots = torch.tensor(lengths)[:, None] + behind - 2
    uniform = torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(0))
    found = continue_text(target, text, roots, 4, 1.0, uniform, (0, 2))
    for b in range(2):
        for p in range(2):
            path = found.tokens[b, p]
            expected = log_p(target, b, TAIL[: int(behind[p])], path.tolist())
            logits = target.logits(found.hidden[b, p]) - found.log_normaliser[b, p][:, None]
            torch.testing.assert_close(logits.gather(1, path[:, None])[:, 0], expected, **CLOSE)
