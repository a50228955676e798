"""Packed scoring of drafted paths against one path at a time, and the topology of tries and trees."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import along
import tiny
from architectures import ARCHITECTURES
from vsd.paths import NO_TOKEN, Tree, leaf_paths, score_paths
from vsd.paths.scored import merge
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


@pytest.mark.parametrize(("steps", "temperature"), [(1, 1.0), (4, 1.0), (4, 0.6)])
def test_packed_scores_are_those_of_one_path_at_a_time(target: Target, steps: int, temperature: float) -> None:
    ids, lengths, roots, tokens = some_paths(steps)
    found = score_paths(target, along.text(ids, lengths), roots, tokens, temperature)
    for b, s in itertools.product(range(2), range(12)):
        root = int(roots[b, s])
        text = torch.cat([ids[b, : root + 2], tokens[b, s]])[None]
        hidden = target.features(along.text(text)).hidden[0, root + 1 : -1]  # [K, h]
        log_p = (target.logits(hidden) / temperature).log_softmax(-1)
        rows = found.rows[b, s]
        torch.testing.assert_close(found.hidden[rows], hidden, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            found.log_p[b, s], log_p.gather(1, tokens[b, s][:, None])[:, 0], rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            found.log_normaliser[rows], (target.logits(hidden) / temperature).logsumexp(-1), rtol=1e-4, atol=1e-4
        )
    prefixes = {
        (b, int(roots[b, s]), *tokens[b, s, :k].tolist()) for b in range(2) for s in range(12) for k in range(steps)
    }
    assert len(found.hidden) == len(prefixes)


def test_paths_may_end_early(target: Target) -> None:
    """Short and empty paths among long ones: the same scores, and no node for what does not exist."""
    ids, lengths, roots, tokens = some_paths()
    ends = torch.arange(12).expand(2, 12) % 5  # 0 … 4 tokens
    short = tokens.masked_fill(torch.arange(4) >= ends[..., None], NO_TOKEN)
    whole, found = (score_paths(target, along.text(ids, lengths), roots, some) for some in (tokens, short))
    exists = short >= 0
    torch.testing.assert_close(found.log_p[exists], whole.log_p[exists], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.hidden[found.rows[exists]], whole.hidden[whole.rows[exists]], rtol=1e-4, atol=1e-5)
    prefixes = {
        (b, int(roots[b, s]), *short[b, s, :k].tolist())
        for b, s in itertools.product(range(2), range(12))
        for k in range(max(1, int(ends[b, s])))
    }
    assert len(found.hidden) == len(prefixes)
    nothing = score_paths(target, along.text(ids, lengths), roots, torch.full_like(tokens, NO_TOKEN))
    assert len(nothing.hidden) == 6


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 10**6), min_size=7, max_size=7), min_size=1, max_size=4))
def test_leaf_paths_are_what_brute_force_finds(draws: list[list[int]]) -> None:
    """Every leaf's path once, and every node fresh in exactly one of them."""
    parents = [[0] + [draw % i for i, draw in enumerate(row, start=1)] for row in draws]
    depths = [[0] * 8 for _ in parents]
    for row, depth in zip(parents, depths):
        for node in range(1, 8):
            depth[node] = depth[row[node]] + 1
    tokens = torch.arange(100, 108).expand(len(parents), -1)  # a token names its node
    tree = Tree(tokens, torch.tensor(parents), torch.tensor(depths), torch.zeros(len(parents), 8))
    found, fresh = leaf_paths(tree, 7)
    for b, row in enumerate(parents):
        expected = set()
        for leaf in set(range(1, 8)) - set(row):
            path, node = (), leaf
            while node:
                path, node = (100 + node, *path), row[node]
            expected.add(path)
        paths = [tuple(t for t in path if t != NO_TOKEN) for path in found[b].tolist()]
        assert sorted(filter(None, paths)) == sorted(expected)
        assert all(path[: len(p)] == list(p) for path, p in zip(found[b].tolist(), paths))  # no gaps
        assert sorted(found[b][fresh[b]].tolist()) == list(range(101, 108))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_merged_paths_are_a_trie(B: int, P: int, K: int, seed: int) -> None:
    """One node for every distinct (root, prefix) and no other; each sees its own prefixes."""
    g = torch.Generator().manual_seed(seed)
    roots, tokens = torch.randint(0, 2, (B, P), generator=g), torch.randint(0, 2, (B, P, K), generator=g)
    trie = merge(roots, tokens)
    sizes = []
    for b in range(B):
        named: dict[tuple[int, ...], int] = {}
        for p, k in itertools.product(range(P), range(K)):
            name = (int(roots[b, p]), *tokens[b, p, : k + 1].tolist())
            node = int(trie.node[b, p, k])
            assert named.setdefault(name, node) == node
            assert int(trie.tokens[b, node]) == name[-1]
            assert (int(trie.top[b, node]), int(trie.depths[b, node])) == (name[0], k)
            assert int(trie.context[b, node]) == name[0] + 2
            above = {int(trie.node[b, p, j]) for j in range(k + 1)}
            assert set(trie.ancestors[b, node].nonzero()[:, 0].tolist()) == above
            assert max(above) == node
        assert len(set(named.values())) == len(named)
        sizes.append(len(named))
    assert trie.tokens.shape[1] == max(sizes)
