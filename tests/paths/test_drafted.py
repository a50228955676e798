"""Packed scoring of drawn paths against one path at a time, and where drawn paths come from."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from architectures import ARCHITECTURES
from vsd.drafters import Eagle3Drafter, draft_vocabulary
from vsd.paths import draw_paths, score_paths
from vsd.paths.drafted import merge
from vsd.targets import Target


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def target(request: pytest.FixtureRequest) -> Target:
    return ARCHITECTURES[request.param]()


def some_paths(steps: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two texts of 20 and 13 tokens; in each three roots with four paths of few distinct tokens, so that many agree."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, tiny.VOCAB, (2, 20), generator=g)
    lengths = torch.tensor([20, 13])
    roots = torch.tensor([[2, 9, 18], [0, 5, 11]]).repeat_interleave(4, 1)
    return ids, lengths, roots, torch.randint(5, 8, (2, 12, steps), generator=g)


@pytest.mark.parametrize("steps", [1, 4])
def test_packed_scores_are_those_of_one_path_at_a_time(target: Target, steps: int) -> None:
    ids, lengths, roots, tokens = some_paths(steps)
    found = score_paths(target, ids, lengths, roots, tokens)
    for b, s in itertools.product(range(2), range(12)):
        root = int(roots[b, s])
        text = torch.cat([ids[b, : root + 2], tokens[b, s]])[None]
        hidden = target.features(text).hidden[0, root + 1 : -1]  # [K, h]
        log_p = target.logits(hidden).log_softmax(-1)
        rows = found.rows[b, s]
        torch.testing.assert_close(found.hidden[rows], hidden, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            found.log_p[b, s], log_p.gather(1, tokens[b, s][:, None])[:, 0], rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            found.log_normaliser[rows], target.logits(hidden).logsumexp(-1), rtol=1e-4, atol=1e-4
        )
    prefixes = {
        (b, int(roots[b, s]), *tokens[b, s, :k].tolist()) for b in range(2) for s in range(12) for k in range(steps)
    }
    assert len(found.hidden) == len(prefixes)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_merged_paths_are_a_trie(B: int, P: int, K: int, seed: int) -> None:
    """One node for every distinct (root, prefix) and no other; each sees its own prefixes."""
    g = torch.Generator().manual_seed(seed)
    roots, tokens = torch.randint(0, 2, (B, P), generator=g), torch.randint(0, 2, (B, P, K), generator=g)
    trie = merge(roots, tokens)
    sizes = []
    for b in range(B):
        named = {}
        for p, k in itertools.product(range(P), range(K)):
            name = (int(roots[b, p]), *tokens[b, p, : k + 1].tolist())
            node = int(trie.node[b, p, k])
            assert named.setdefault(name, node) == node
            assert int(trie.tokens[b, node]) == name[-1]
            assert int(trie.positions[b, node]) == name[0] + 2 + k
            assert int(trie.context[b, node]) == name[0] + 2
            above = {int(trie.node[b, p, j]) for j in range(k + 1)}
            assert set(trie.ancestors[b, node].nonzero()[:, 0].tolist()) == above
            assert max(above) == node
        assert len(set(named.values())) == len(named)
        sizes.append(len(named))
    assert trie.tokens.shape[1] == max(sizes)


@pytest.fixture
def drafter(tiny_target: Target) -> Eagle3Drafter:
    torch.manual_seed(2)
    vocabulary = draft_vocabulary(torch.arange(15, 90), tiny_target.vocab_size, 50)
    return Eagle3Drafter.for_target(tiny_target, vocabulary, initializer_range=0.5).eval()


def test_drawn_paths_carry_the_drafters_probabilities(tiny_target: Target, drafter: Eagle3Drafter) -> None:
    """What `sample` says of its paths is what `forward` says when it is given them."""
    ids, _, roots, _ = some_paths()
    aux = tiny_target.features(ids).aux
    g = torch.Generator().manual_seed(0)
    tokens, log_q = draw_paths(drafter, tiny_target, aux, ids, roots, 4, 1.0, g)
    words = torch.cat([ids.gather(1, roots + 1)[..., None], tokens[..., :-1]], -1).permute(2, 0, 1)
    with torch.no_grad():
        hidden = drafter(aux, tiny_target.embed(ids.roll(-1, 1)), roots, tiny_target.embed(words))
        wanted = drafter.lm_head(hidden).log_softmax(-1).permute(1, 2, 0, 3)  # [B, P, K, Vd]
    index = torch.searchsorted(drafter.draft_ids(), tokens)
    assert torch.equal(drafter.draft_ids()[index], tokens)
    torch.testing.assert_close(log_q, wanted.gather(-1, index[..., None])[..., 0], rtol=1e-4, atol=1e-5)


def test_paths_are_drawn_from_q_at_the_temperature(tiny_target: Target, drafter: Eagle3Drafter) -> None:
    """First tokens of 4,000 paths below one root; total variation from the law is within chance (about 0.03)."""
    ids = some_paths()[0][:1]
    aux, roots = tiny_target.features(ids).aux, torch.full((1, 4000), 9)
    g = torch.Generator().manual_seed(0)
    laws = {}
    for temperature in (1.0, 0.5):
        tokens, log_q = draw_paths(drafter, tiny_target, aux, ids, roots, 1, temperature, g)
        index = torch.searchsorted(drafter.draft_ids(), tokens[0, :, 0])
        found = torch.bincount(index, minlength=50) / 4000
        q = torch.zeros(50).scatter(0, index, log_q[0, :, 0])  # at temperature 1, where drawn at all
        law = torch.where(q != 0, (q / temperature).exp(), 0.0)
        laws[temperature] = law / law.sum()
        assert (found - laws[temperature]).abs().sum() / 2 < 0.06
    assert (laws[1.0] - laws[0.5]).abs().sum() / 2 > 0.1
