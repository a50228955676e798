"""Roads not taken: what the target says along them, and drafting from them, against texts of their own."""

import itertools

import pytest
import torch
from torch import Tensor

import tiny
from architectures import ARCHITECTURES
from vsd.drafters import Eagle3Drafter, draft_vocabulary
from vsd.errors import VSDError
from vsd.paths import Entries, along, beside, consumed, continue_text
from vsd.targets import Target

LENGTH = 4


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
    ids, roots = texts()
    found = continue_text(target, ids, roots, LENGTH, temperature, numbers(2, 4, LENGTH))
    for b, p in itertools.product(range(2), range(4)):
        root, tokens = int(roots[b, p]), found.tokens[b, p]
        assert tokens[0] != ids[b, root + 2]
        own = target.features(torch.cat([ids[b, : root + 2], tokens])[None])
        hidden = own.hidden[0, root + 1 : -1]
        torch.testing.assert_close(found.hidden[b, p], hidden, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.aux[b, p], own.aux[0, root + 2 : -1], rtol=1e-3, atol=1e-4)
        normaliser = (target.logits(hidden) / temperature).logsumexp(-1)
        torch.testing.assert_close(found.log_normaliser[b, p], normaliser, rtol=1e-4, atol=1e-4)


def test_tokens_are_drawn_from_p(tiny_target: Target) -> None:
    """Two tokens of 6,000 paths below one root: the first without the text's own, the second behind the commonest."""
    ids, _ = texts()
    roots = torch.full((1, 6000), 9)
    found = continue_text(tiny_target, ids[:1], roots, 2, 0.7, numbers(1, 6000, 2))

    def law(text: Tensor) -> Tensor:
        return (tiny_target.logits(tiny_target.features(text[None]).hidden[0, -1]) / 0.7).softmax(-1)

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


@pytest.fixture
def drafter(tiny_target: Target) -> Eagle3Drafter:
    torch.manual_seed(2)
    vocabulary = draft_vocabulary(torch.arange(15, 90), tiny_target.vocab_size, 50)
    return Eagle3Drafter.for_target(tiny_target, vocabulary, initializer_range=0.5).eval()


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_they_are_drafted_from_as_if_they_were_texts(tiny_target: Target, drafter: Eagle3Drafter, steps: int) -> None:
    """From everywhere along every path, beside the text; a path ends early, one has no token at all."""
    ids, roots = texts()
    found = continue_text(tiny_target, ids, roots, LENGTH, 1.0, numbers(2, 4, LENGTH))
    exists = torch.arange(LENGTH) < torch.tensor([[4, 4, 2, 4], [0, 4, 1, 3]])[..., None]
    text = Entries(tiny_target.features(ids).aux, ids.roll(-1, 1))
    entries, paths = beside(text, found), along(found, exists, 20, steps)
    words = tiny_target.embed(consumed(entries.next_ids, paths))
    where = {"positions": entries.positions, "seen": entries.seen}
    with torch.no_grad():
        hidden = drafter(entries.aux, tiny_target.embed(entries.next_ids), paths.roots, words, **where)
    for b, p, k in itertools.product(range(2), range(4), range(LENGTH)):
        ahead, i = min(steps, max(0, int(exists[b, p].sum()) - k)), LENGTH * p + k
        assert int(paths.valid[b, i].sum()) == ahead
        if not ahead:
            continue
        root = int(roots[b, p])
        own = torch.cat([ids[b, : root + 2], found.tokens[b, p, : k + ahead]])[None]
        features = tiny_target.features(own)
        embeds = tiny_target.embed(own[0, root + 1 + k :][:ahead])[:, None, None]
        with torch.no_grad():
            wanted = drafter(features.aux, tiny_target.embed(own.roll(-1, 1)), torch.tensor([[root + k]]), embeds)
        torch.testing.assert_close(hidden[:ahead, b, i], wanted[:, 0, 0], rtol=1e-3, atol=1e-4)
        assert torch.equal(paths.tokens[b, i, :ahead], own[0, root + 2 + k :])
        states = found.hidden.flatten(0, 2)[paths.rows[b, i, :ahead]]
        torch.testing.assert_close(states, features.hidden[0, root + 1 + k : -1], rtol=1e-3, atol=1e-4)


def test_paths_longer_than_a_sliding_window_are_refused() -> None:
    target = next(t for t in (build() for build in ARCHITECTURES.values()) if t.window is not None)
    ids, roots = texts()
    with pytest.raises(VSDError, match="attention sees only"):
        continue_text(target, ids, roots, target.window + 1, 1.0, numbers(2, 4, target.window + 1))
