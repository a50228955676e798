"""Alternative continuations: the target along them, and drafting from them, against texts of their own."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import along as given
import seeing
import tiny
from architectures import ARCHITECTURES
from vsd.drafters import FAMILIES, draft_vocabulary, new_drafter
from vsd.paths import along, continue_text, extended
from vsd.targets import Target

LENGTH = 4
LAYERS = (0, 2, 3)


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def target(request: pytest.FixtureRequest) -> Target:
    return ARCHITECTURES[request.param]()


def texts() -> tuple[Tensor, Tensor]:
    """Two texts of 20 and 13 tokens, right-padded, and three roots in each, one of them twice."""
    ids = torch.randint(3, tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    ids[1, 13:] = 0
    return ids, torch.tensor([[2, 9, 9, 17], [0, 5, 10, 5]])


def numbers(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_continuations_are_scored_like_texts_of_their_own(target: Target, temperature: float) -> None:
    """Also where they are longer than the window of sliding attention (5 and 6 tokens)."""
    length = 8
    ids, roots = texts()
    found = continue_text(target, given.text(ids), roots, length, temperature, numbers(2, 4, length), LAYERS)
    for b, p in itertools.product(range(2), range(4)):
        root, tokens = int(roots[b, p]), found.tokens[b, p]
        assert tokens[0] != ids[b, root + 2]
        own = target.features(given.text(torch.cat([ids[b, : root + 2], tokens])[None]), LAYERS)
        hidden = own.hidden[0, root + 1 : -1]
        torch.testing.assert_close(found.hidden[b, p], hidden, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.aux[b, p], own.aux[0, root + 2 : -1], rtol=1e-3, atol=1e-4)
        normaliser = (target.logits(hidden) / temperature).logsumexp(-1)
        torch.testing.assert_close(found.log_normaliser[b, p], normaliser, rtol=1e-4, atol=1e-4)


def test_tokens_are_drawn_from_p(tiny_target: Target) -> None:
    """Two tokens of 6,000 paths below one root: the first without the text's own, the second behind the commonest."""
    ids, _ = texts()
    roots = torch.full((1, 6000), 9)
    found = continue_text(tiny_target, given.text(ids[:1]), roots, 2, 0.7, numbers(1, 6000, 2), ())

    def law(text: Tensor) -> Tensor:
        return (tiny_target.logits(tiny_target.features(given.text(text[None])).hidden[0, -1]) / 0.7).softmax(-1)

    first = law(ids[0, :11])
    first[ids[0, 11]] = 0
    drawn = found.tokens[0, :, 0]
    assert (torch.bincount(drawn, minlength=tiny.VOCAB) / 6000 - first / first.sum()).abs().sum() / 2 < 0.06
    common = drawn.mode().values
    second = found.tokens[0, drawn == common, 1]
    wanted = law(torch.cat([ids[0, :11], common[None]]))
    assert len(second) > 300
    assert (torch.bincount(second, minlength=tiny.VOCAB) / len(second) - wanted).abs().sum() / 2 < 0.25
    assert (wanted - first / first.sum()).abs().sum() / 2 > 0.4


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tiny_target: Target) -> tuple[Target, Any]:
    torch.manual_seed(2)
    target = seeing.target("llava") if request.param == "vispec" else tiny_target
    vocabulary = draft_vocabulary(torch.arange(15, 90), target.vocab_size, 50)
    scale = 0.1 if request.param == "vispec" else 0.5  # its states have no norm
    return target, new_drafter(target, vocabulary, request.param, initializer_range=scale).eval()


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_they_are_drafted_from_as_if_they_were_texts(pair: tuple[Target, Any], steps: int) -> None:
    """From everywhere along every path, beside the text; a path ends early, one has no token at all."""
    target, drafter = pair
    ids, roots = texts()
    layers = drafter.needs.layers
    found = continue_text(target, given.text(ids), roots, LENGTH, 1.0, numbers(2, 4, LENGTH), layers)
    exists = torch.arange(LENGTH) < torch.tensor([[4, 4, 2, 4], [0, 4, 1, 3]])[..., None]
    entries = extended(given.entries(target, ids, layers), found)
    paths = along(found, exists, 20, steps)
    with torch.no_grad():
        hidden = given.states(drafter, entries, paths)
    for b, p, k in itertools.product(range(2), range(4), range(LENGTH)):
        ahead, i = min(steps, max(0, int(exists[b, p].sum()) - k)), LENGTH * p + k
        assert int(paths.valid[b, i].sum()) == ahead
        if not ahead:
            continue
        root = int(roots[b, p])
        own = torch.cat([ids[b, : root + 2], found.tokens[b, p, : k + ahead]])[None]
        rest = torch.nn.functional.pad(own[:, None, root + 2 + k :], (0, steps - ahead))  # a block has its whole length
        path = given.paths(torch.tensor([[root + k]]), rest)
        with torch.no_grad():
            wanted = given.states(drafter, given.entries(target, own, layers), path)
        torch.testing.assert_close(hidden[:ahead, b, i], wanted[:ahead, 0, 0], rtol=1e-3, atol=1e-4)
        assert torch.equal(paths.tokens[b, i, :ahead], own[0, root + 2 + k :])
        states = found.hidden.flatten(0, 2)[paths.rows[b, i, :ahead]]
        read = target.features(given.text(own)).hidden[0, root + 1 + k : -1]
        torch.testing.assert_close(states, read, rtol=1e-3, atol=1e-4)
