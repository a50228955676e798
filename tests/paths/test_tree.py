"""Draft trees and chains against slow references that recompute every node with the training pass."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import along
import seeing
from architectures import ARCHITECTURES, llama
from vsd.drafters import FAMILIES, draft_vocabulary, lattice, new_drafter
from vsd.errors import ConfigurationError, VSDError
from vsd.paths import NO_TOKEN, Entries, Tree, TreeShape, ancestors, graft
from vsd.targets import Target

Path = tuple[int, ...]


@given(st.lists(st.lists(st.integers(0, 10**6), min_size=9, max_size=9), min_size=1, max_size=4))
def test_ancestors_are_what_brute_force_finds(draws: list[list[int]]) -> None:
    parents = [[0] + [draw % i for i, draw in enumerate(row, start=1)] for row in draws]
    expected = torch.zeros(len(parents), 10, 10, dtype=torch.bool)
    longest = 0
    for b, row in enumerate(parents):
        for node in range(10):
            above, steps = node, 0
            expected[b, node, above] = True
            while above != 0:
                above, steps = row[above], steps + 1
                expected[b, node, above] = True
            longest = max(longest, steps)
    for depth in (longest, longest + 3):
        assert torch.equal(ancestors(torch.tensor(parents), depth), expected)


class Setting:
    """A target, a random drafter, and ragged contexts that both have read; the drafter reads them in two steps."""

    def __init__(self, target: Target, family: str = "eagle3", seed: int = 0, vocabulary: int = 40) -> None:
        torch.manual_seed(seed)
        self.target = target
        common = draft_vocabulary(torch.randperm(128)[:vocabulary], 128, vocabulary)
        scale = 0.1 if family == "vispec" else 0.3  # its states have no norm
        self.drafter = new_drafter(target, common, family, initializer_range=scale).eval().requires_grad_(False)
        self.first, self.second = torch.tensor([6, 1, 11]), torch.tensor([2, 4, 1])
        self.lengths = self.first + self.second
        self.ids = torch.randint(15, 128, (3, int(self.lengths.max()) + 1))  # the last real one is the root
        if family == "vispec":
            self.ids[self.ids == seeing.ID["<image>"]] = 40  # text alone
        self.root = self.ids.gather(1, self.lengths[:, None])[:, 0]
        read = along.entries(target, self.ids[:, :-1], self.drafter.needs.layers)
        self.entries = read._replace(next_ids=self.ids[:, 1:])

    def read(self) -> Any:
        """The drafter's state at the root, with a tree drafted in between whose slots are used again."""
        prompt, next_ids, aux = along.text(self.ids[:, :11], self.first), self.entries.next_ids, self.entries.aux
        first = self.ids.gather(1, self.first[:, None])[:, 0]
        state = self.drafter.begin(prompt, aux[:, :11], first, 12)
        self.drafter.propose(state, first, TreeShape(3, 3, 8))
        rest = (self.first[:, None] + torch.arange(4)).clamp(max=next_ids.shape[1] - 1)
        features = aux.gather(1, rest[..., None].expand(-1, -1, aux.shape[-1]))
        self.drafter.advance(state, features, next_ids.gather(1, rest), self.second)
        return state

    def log_probs(self, row: int, path: Path, depth: int) -> Tensor:
        """log q of the token after the root and `path`, [Vd]."""
        return self.laws(row, [path], depth)[0]

    def laws(self, row: int, paths: list[Path], depth: int) -> Tensor:
        """log q of the token after the root and each of some paths of a length, in a draft of `depth`, [P, Vd].

        By the training pass alone.
        """
        n = int(self.lengths[row])
        some = Entries(
            self.entries.aux[row : row + 1, :n],
            self.entries.next_ids[row : row + 1, :n],
            self.ids[row : row + 1, 0],
            self.entries.positions[row : row + 1, :n],
        )
        length = len(paths[0])
        tokens = [[*path, *[0] * (depth - length)] for path in paths]  # the law of a block may depend on its length
        drafted = along.paths(torch.full((1, len(paths)), n - 1), torch.tensor([tokens]))
        found: Tensor = self.drafter(some, drafted, lambda states, head: lattice.logits(states[length, 0], head))
        return found.log_softmax(-1)

    def tree(self, shape: TreeShape) -> Tree:
        return self.drafter.propose(self.read(), self.root, shape)


def reference_tree(
    laws: Callable[[list[Path]], Tensor], ids: list[int], shape: TreeShape, beam: int
) -> list[tuple[Path, float]]:
    """EAGLE-2's tree by loops: the best `nodes` - 1 paths of the pool and their cumulative log-probabilities."""

    def children(nodes: list[tuple[Path, float]]) -> list[tuple[Path, float]]:
        found = []
        for (path, score), logp in zip(nodes, laws([path for path, _ in nodes]).tolist()):
            likely = sorted(range(len(ids)), key=lambda i: -logp[i])[: shape.top_k]
            found += [((*path, ids[i]), score + logp[i]) for i in likely]
        return found

    def best(nodes: list[tuple[Path, float]], count: int) -> list[tuple[Path, float]]:
        return sorted(nodes, key=lambda node: -node[1])[:count]

    newest = children([((), 0.0)])
    pool = list(newest)
    for _ in range(shape.depth - 1):
        newest = children(best(newest, beam))
        pool += newest
    return best(pool, shape.nodes - 1)


def paths_of(tree: Tree, row: int) -> list[Path]:
    """Tokens from below the root down to each node; the root's path is empty."""
    paths: list[Path] = [()]
    for node in range(1, tree.tokens.shape[1]):
        paths.append((*paths[int(tree.parents[row, node])], int(tree.tokens[row, node])))
    return paths


def target_for(family: str, name: str = "llama") -> Target:
    """A target of an architecture; for the family that takes none of text, one that reads images."""
    return seeing.target("llava") if family == "vispec" else ARCHITECTURES[name]()


PAIRS = [(name, family) for name in sorted(ARCHITECTURES) for family in FAMILIES if family != "vispec"]


@pytest.mark.parametrize(("name", "family"), [*PAIRS, ("llama", "vispec")], ids="-".join)
@pytest.mark.parametrize("shape", [TreeShape(4, 3, 14), TreeShape(5, 4, 12), TreeShape(1, 5, 6)], ids=str)
@torch.no_grad()
def test_proposed_tree_is_the_reference_tree(name: str, family: str, shape: TreeShape) -> None:
    """Same nodes and same log-probabilities: so decoding drafts exactly what training supervises."""
    setting = Setting(target_for(family, name), family)
    tree, ids = setting.tree(shape), setting.drafter.vocabulary.ids.tolist()
    for row in range(3):
        laws, beam = partial(setting.laws, row, depth=shape.depth), setting.drafter.beam(shape)
        expected = dict(reference_tree(laws, ids, shape, beam))
        found = dict(zip(paths_of(tree, row)[1:], tree.log_q[row, 1:].tolist()))
        assert found.keys() == expected.keys()
        for path, score in found.items():
            assert score == pytest.approx(expected[path], abs=2e-4)
    if shape.depth > 2:
        assert int(tree.depths.max()) >= 2  # or the beam was never tested


SETTING = Setting(llama(), seed=1)
SETTINGS = {family: Setting(target_for(family), family, seed=1) for family in FAMILIES} | {"eagle3": SETTING}


@st.composite
def shapes(draw: st.DrawFn) -> TreeShape:
    depth, top_k = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return TreeShape(depth, top_k, draw(st.integers(2, 1 + top_k + (depth - 1) * top_k**2)))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(shapes(), st.sampled_from(["eagle3", "dflash"]))
@torch.no_grad()
def test_tree_invariants(shape: TreeShape, family: str) -> None:
    setting = SETTINGS[family]
    tree = setting.tree(shape)
    N = shape.nodes
    assert all(field.shape == (3, N) for field in tree)
    assert torch.equal(tree.tokens[:, 0], setting.root)
    assert not (tree.parents[:, 0] | tree.depths[:, 0]).any() and not tree.log_q[:, 0].any()
    assert (tree.parents[:, 1:] < torch.arange(1, N)).all()  # parents first, so connected
    assert torch.equal(tree.depths[:, 1:], 1 + tree.depths.gather(1, tree.parents)[:, 1:])
    assert int(tree.depths.max()) <= shape.depth
    assert (tree.log_q[:, 1:] <= tree.log_q.gather(1, tree.parents)[:, 1:]).all()
    assert torch.isin(tree.tokens[:, 1:], setting.drafter.vocabulary.ids).all()
    for row in range(3):
        paths = paths_of(tree, row)
        assert len(set(paths)) == N  # siblings are distinct
        node = N - 1
        law = setting.log_probs(row, paths[node][:-1], shape.depth)
        logp = law[setting.drafter.vocabulary.ids == paths[node][-1]]
        step = tree.log_q[row, node] - tree.log_q[row, tree.parents[row, node]]
        assert float(step) == pytest.approx(float(logp), abs=2e-4)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 12), st.sampled_from(["peagle", "dflash"]))
@torch.no_grad()
def test_block_drafters_grow_the_best_tree_there_is(depth: int, top_k: int, nodes: int, family: str) -> None:
    """Against all products of marginals: no prefix outside the tree is likelier than one inside."""
    setting, shape = SETTINGS[family], TreeShape(depth, top_k, min(nodes, 1 + top_k + (depth - 1) * top_k**2))
    tree = setting.tree(shape)
    for row in range(3):
        laws = [setting.log_probs(row, (0,) * k, depth).topk(top_k) for k in range(depth)]
        every = [torch.zeros(1)]
        for law in laws if top_k > 1 else []:
            every.append((every[-1][:, None] + law.values).flatten())
        for law in laws if top_k == 1 else []:
            every.append(every[-1] + law.values)
        best = torch.cat(every[1:]).sort(descending=True).values[: shape.nodes - 1]
        torch.testing.assert_close(tree.log_q[row, 1:].sort(descending=True).values, best, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(shapes(), st.sampled_from([1e-4, 0.003, 0.03, 0.2, 0.9]))
@torch.no_grad()
def test_unlikely_nodes_are_left_out(shape: TreeShape, p_min: float) -> None:
    """The tree with p_min has the likely nodes of the tree without, and of rows with fewer the next best."""
    whole, part = SETTING.tree(shape), SETTING.tree(replace(shape, p_min=p_min))
    likely = whole.log_q >= math.log(p_min)
    assert part.tokens.shape[1] == int(likely.sum(1).max())
    for row in range(3):
        nodes = dict(zip(paths_of(part, row), part.log_q[row].tolist()))
        assert len(nodes) == part.tokens.shape[1]
        for path, score, kept in zip(paths_of(whole, row), whole.log_q[row].tolist(), likely[row].tolist()):
            assert not kept or nodes[path] == pytest.approx(score, abs=1e-5)


@torch.no_grad()
def test_drafting_ends_below_unlikely_nodes() -> None:
    depths = {p: int(SETTING.tree(TreeShape(5, 3, 39, p)).depths.max()) for p in (0.0, 0.01, 0.9)}
    assert depths[0.0] == 5 > depths[0.01] > depths[0.9] == 0


@settings(deadline=None, max_examples=40, derandomize=True)
@given(shapes(), st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=3, max_size=3), st.booleans())
@torch.no_grad()
def test_grafted_trees_hold_the_tree_and_the_path(shape: TreeShape, chains: list[list[int]], along: bool) -> None:
    """Every path once, parents first; a path that begins inside the tree shares its nodes."""
    tree = SETTING.tree(shape)
    if along:
        chains = [[*paths_of(tree, row)[-1], *chain] for row, chain in enumerate(chains)]
    grown, on_path = graft(tree, chains)
    N = grown.tokens.shape[1]
    assert (grown.parents[:, 1:] < torch.arange(1, N)).all()
    assert torch.equal(grown.depths[:, 1:], 1 + grown.depths.gather(1, grown.parents)[:, 1:])
    needed = []
    for row, chain in enumerate(chains):
        before, after = set(paths_of(tree, row)), paths_of(grown, row)
        path = {tuple(chain[:k]) for k in range(len(chain) + 1)}
        needed.append(len(before | path))
        assert set(after[: needed[-1]]) == before | path and after[needed[-1] :] == [(NO_TOKEN,)] * (N - needed[-1])
        assert {after[node] for node in on_path[row].nonzero()[:, 0].tolist()} == path
    assert max(needed) == N


@torch.no_grad()
def test_a_chain_is_a_tree_of_one_branch() -> None:
    shape = TreeShape.chain(4)
    assert shape == TreeShape(4, 1, 5)
    tree = SETTING.tree(shape)
    assert tree.parents.tolist() == [[0, 0, 1, 2, 3]] * 3
    assert tree.depths.tolist() == [[0, 1, 2, 3, 4]] * 3
    ids = SETTING.drafter.vocabulary.ids
    for row in range(3):
        path: Path = ()
        for _ in range(4):
            path = (*path, int(ids[SETTING.log_probs(row, path, 4).argmax()]))
        assert paths_of(tree, row)[-1] == path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_sampled_chain_reports_the_distribution_it_was_drawn_from(family: str, temperature: float) -> None:
    setting = SETTINGS[family]

    def chain(seed: int):  # type: ignore[no-untyped-def]
        generators = [torch.Generator().manual_seed(seed + row) for row in range(3)]
        return setting.drafter.draw(setting.read(), setting.root, TreeShape.chain(3), [temperature] * 3, generators)

    tree, draft_logp, ids = chain(0)
    assert torch.equal(ids, setting.drafter.vocabulary.ids)
    assert draft_logp.shape == (3, 3, len(ids)) and tree.parents.tolist() == [[0, 0, 1, 2]] * 3
    for row in range(3):
        path, total = paths_of(tree, row)[-1], 0.0
        for k in range(3):
            expected = (setting.log_probs(row, path[:k], 3) / temperature).log_softmax(-1)
            torch.testing.assert_close(draft_logp[row, k], expected, rtol=0, atol=5e-4)
            total += float(expected[ids == path[k]])
            assert float(tree.log_q[row, k + 1]) == pytest.approx(total, abs=1e-3)
    assert torch.equal(chain(0).tree.tokens, tree.tokens)
    assert any(not torch.equal(chain(seed).tree.tokens, tree.tokens) for seed in (1, 2))
    given = setting.drafter.log_q(setting.read(), setting.root, tree.tokens[:, 1:], temperature)
    torch.testing.assert_close(given.cumsum(1), tree.log_q[:, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 2, 1), (2, 2, 8), (3, 1, 5), (-1, 1, 2)])
def test_impossible_shapes_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(VSDError, match="nodes"):
        TreeShape(*shape)


@pytest.mark.parametrize("p_min", [-0.1, 1.0])
def test_impossible_probabilities_are_refused(p_min: float) -> None:
    with pytest.raises(VSDError, match="p_min"):
        TreeShape(p_min=p_min)


def test_shapes_are_read_from_text() -> None:
    assert TreeShape.parse("3x2x5") == TreeShape(3, 2, 5)
    assert TreeShape.parse("3x2x5x0.1") == TreeShape(3, 2, 5, 0.1)
    assert TreeShape.parse("3x2x5x0x8") == TreeShape(3, 2, 5, lookup=8)
    assert TreeShape.parse("4") == TreeShape.parse("4x1x5") == TreeShape.chain(4)
    for text in ("", "x", "3xtwo", "3x2", "3x2x5x", "3x2x5x0x8x1", "3x2x5.5", "three"):
        with pytest.raises(ConfigurationError, match="depth x top_k x nodes"):
            TreeShape.parse(text)
    for text in ("0", "3x2x99", "3x2x5x1", "3x2x5x0x-1"):
        with pytest.raises(ConfigurationError):
            TreeShape.parse(text)
    with pytest.raises(VSDError, match="lookup"):
        TreeShape(lookup=-1)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (TreeShape(5, 4, 16), "5x4x16"),
        (TreeShape.chain(3), "3x1x4"),
        (TreeShape(5, 4, 16, 0.05), "5x4x16x0.05"),
        (TreeShape(5, 4, 16, lookup=8), "5x4x16x0x8"),
        (TreeShape(5, 4, 16, 0.05, 8), "5x4x16x0.05x8"),
    ],
)
def test_the_text_of_a_shape_is_the_one_that_is_read(shape: TreeShape, text: str) -> None:
    assert str(shape) == text
    assert TreeShape.parse(text) == shape


def test_largest_possible_shapes_are_not() -> None:
    assert TreeShape(2, 2, 7).pool == 6
    assert TreeShape(1, 1, 2).pool == 1
