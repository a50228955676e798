"""Verification is lossless: the output's law by exact enumeration, and by χ² where the code samples."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList

from goodness import p_value
from vsd.errors import ConfigurationError, TargetError
from vsd.paths import Chain, Tree
from vsd.targets.sampling import draw, probabilities
from vsd.verification import follow, verify, walk
from vsd.verification.law import Law as TokenLaw
from vsd.verification.rejection import acceptance, residual
from vsd.verification.walk import path_of

Path = tuple[int, ...]
Law = dict[Path, Tensor]  # context -> distribution of the next token, float64


def contexts(V: int, depth: int) -> list[Path]:
    return [c for n in range(depth + 1) for c in itertools.product(range(V), repeat=n)]


def random_law(V: int, depth: int, seed: int) -> Law:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(V, generator=generator, dtype=torch.float64) + 0.05  # noqa: E731
    return {c: (weights := draw()) / weights.sum() for c in contexts(V, depth)}


def probability(law: Law, tokens: Path, start: int = 0) -> float:
    """Probability of tokens[start:] after tokens[:start]."""
    result = 1.0
    for i in range(start, len(tokens)):
        result *= float(law[tokens[:i]][tokens[i]])
    return result


def assert_law(found: dict[Path, float], p: Law, V: int, length: int) -> None:
    """`found` maps outputs of up to `length` tokens to their probability; completed by p, they have p's law."""
    for tokens in itertools.product(range(V), repeat=length):
        total = sum(mass * probability(p, tokens, len(out)) for out, mass in found.items() if tokens[: len(out)] == out)
        assert total == pytest.approx(probability(p, tokens), abs=1e-12)


TREES = {
    "bush": ([9, 0, 2, 1, 0, 2], [0, 0, 0, 1, 1, 3], 3),
    "chain": ([9, 1, 1], [0, 0, 1], 3),
    "all tokens": ([9, 0, 1, 2], [0, 0, 0, 0], 3),
    "four tokens": ([9, 3, 0, 3, 1], [0, 0, 0, 2, 3], 4),
}


def node_paths(tokens: list[int], parents: list[int]) -> list[Path]:
    paths: list[Path] = [()]
    for token, parent in zip(tokens[1:], parents[1:]):
        paths.append((*paths[parent], token))
    return paths


def as_tree(tokens: list[int], parents: list[int], rows: int = 1) -> Tree:
    depths = [len(path) for path in node_paths(tokens, parents)]
    columns = [*(torch.tensor(x).expand(rows, -1) for x in (tokens, parents, depths)), torch.zeros(rows, len(tokens))]
    return Tree(*columns)


@pytest.mark.parametrize("name", TREES)
def test_target_rule_has_exactly_the_targets_law(name: str) -> None:
    assert_target_rule_is_exact(*TREES[name], seed=len(name))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=5), st.integers(0, 10**6))
def test_target_rule_is_exact_on_any_tree(nodes: list[tuple[int, int]], seed: int) -> None:
    """Up to five drafted nodes over a vocabulary of three; siblings are distinct, as drafters propose them."""
    tokens, parents = [9], [0]
    for parent, token in nodes:
        parent = min(parent, len(tokens) - 1)
        if (parent, token) not in zip(parents[1:], tokens[1:]):
            parents.append(parent)
            tokens.append(token)
    assert_target_rule_is_exact(tokens, parents, 3, seed)


def assert_target_rule_is_exact(tokens: list[int], parents: list[int], V: int, seed: int) -> None:
    """Every joint choice of the target at the nodes, with its probability, in float64; and E[accepted length]."""
    paths = node_paths(tokens, parents)
    depth = max(map(len, paths))
    p = random_law(V, depth, seed)
    choices = torch.tensor(list(itertools.product(range(V), repeat=len(tokens))))
    mass = torch.stack([p[path] for path in paths])[torch.arange(len(tokens)), choices].prod(1)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
    verdict = follow(as_tree(tokens, parents, len(choices)), choices)
    found: dict[Path, float] = {}
    for nodes, count, bonus, weight in zip(*(x.tolist() for x in (*verdict, mass))):
        accepted = nodes[:count]
        assert accepted[0] == 0 and all(parents[b] == a for a, b in itertools.pairwise(accepted))
        output = (*(tokens[node] for node in accepted[1:]), bonus)
        found[output] = found.get(output, 0.0) + weight
    assert_law(found, p, V, depth + 1)
    expected = sum(probability(p, path) for path in paths[1:])  # node n is reached with Π p along its path
    assert float((mass * (verdict.counts - 1)).sum()) == pytest.approx(expected, abs=1e-12)


def test_follow_by_hand() -> None:
    """Nodes: root 9; its children 4, 7; children 4, 5 of node 1; child 6 of node 3. Token 4 occurs on two levels."""
    tokens, parents = [9, 4, 7, 4, 5, 6], [0, 0, 0, 1, 1, 3]
    cases = {  # choice at each node -> accepted nodes, bonus
        (1, 4, 4, 4, 4, 4): ([0], 1),  # no child of the root matches, although node 3 matches at its parent
        (7, 4, 8, 6, 0, 0): ([0, 2], 8),  # the choice of one sibling excludes the other and its descendants
        (4, 5, 0, 0, 3, 0): ([0, 1, 4], 3),
        (4, 4, 0, 6, 0, 2): ([0, 1, 3, 5], 2),  # a whole path
        (4, 4, 0, 9, 0, 2): ([0, 1, 3], 9),
        (9, 9, 9, 9, 9, 9): ([0], 9),  # the root's own token is no child
    }
    verdict = follow(as_tree(tokens, parents, len(cases)), torch.tensor(list(cases)))
    for b, (nodes, bonus) in enumerate(cases.values()):
        count = int(verdict.counts[b])
        assert verdict.nodes[b, :count].tolist() == nodes and int(verdict.bonus[b]) == bonus
    assert verdict.nodes.shape == (len(cases), 4)
    assert (verdict.nodes >= 0).all() and (verdict.nodes < 6).all()


def test_follow_without_drafted_nodes() -> None:
    verdict = follow(as_tree([3], [0], rows=2), torch.tensor([[5], [6]]))
    assert verdict.nodes.tolist() == [[0], [0]] and verdict.counts.tolist() == [1, 1]
    assert verdict.bonus.tolist() == [5, 6]


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5), st.randoms())
def test_path_of_orders_any_accepted_nodes(below: list[list[bool]], random) -> None:  # type: ignore[no-untyped-def]
    accepted = [[True, *row] for row in below]
    choice = [[random.randrange(99) for _ in row] for row in accepted]
    verdict = path_of(torch.tensor(accepted), torch.tensor(choice))
    assert verdict.nodes.shape == (len(accepted), max(map(sum, accepted)))
    assert ((verdict.nodes >= 0) & (verdict.nodes < 8)).all()
    for b, row in enumerate(accepted):
        expected = [i for i, yes in enumerate(row) if yes]
        assert verdict.nodes[b, : len(expected)].tolist() == expected
        assert int(verdict.counts[b]) == len(expected) and int(verdict.bonus[b]) == choice[b][expected[-1]]


def laws(kind: str, V: int, depth: int) -> tuple[Law, Law]:
    """(p, q) of one difficult kind."""
    p, q = random_law(V, depth, seed=1), random_law(V, depth, seed=2)
    zero = lambda law, token: {c: (w := x.index_fill(0, torch.tensor([token]), 0)) / w.sum() for c, x in law.items()}  # noqa: E731
    point = {c: torch.eye(V, dtype=torch.float64)[(sum(c) + 1) % V] for c in p}
    return {
        "different": (p, q),
        "equal": (p, p),
        "zeros in p": (zero(p, 1), q),
        "pruned q": (p, zero(q, V - 1)),
        "zeros in both": (zero(p, 0), zero(q, 0)),
        "disjoint": (zero(zero(p, 0), 1), {c: zero({c: x}, 2)[c] for c, x in zero(q, 3).items()}),
        "point-mass p": (point, q),
        "point-mass q": (p, point),
    }[kind]


KINDS = ["different", "equal", "zeros in p", "pruned q", "zeros in both", "disjoint", "point-mass p", "point-mass q"]


@pytest.mark.parametrize("kind", KINDS)
def test_rejection_rule_has_exactly_the_targets_law(kind: str) -> None:
    """Every drafted chain of two tokens and every accept/reject outcome, in float64, vocabulary 4."""
    V, K = 4, 2
    p, q = laws(kind, V, K)
    found: dict[Path, float] = {}
    for drafted in itertools.product(range(V), repeat=K):
        reach = probability(q, drafted)
        if reach == 0:
            continue
        for t, token in enumerate(drafted):
            here = p[drafted[:t]], q[drafted[:t]]
            a = float(acceptance(here[0][token].log(), here[1][token].log()))
            assert a == pytest.approx(min(1.0, float(here[0][token] / here[1][token])), abs=1e-15)
            for bonus, mass in enumerate(residual(*here).tolist()):
                output = (*drafted[:t], bonus)
                found[output] = found.get(output, 0.0) + reach * (1 - a) * mass
            reach *= a
        for bonus, mass in enumerate(p[drafted].tolist()):
            found[(*drafted, bonus)] = found.get((*drafted, bonus), 0.0) + reach * mass
    assert_law(found, p, V, K + 1)


def test_residual_and_acceptance_at_the_edges() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.2, 0.0, 0.8])
    torch.testing.assert_close(residual(p, q), torch.tensor([0.375, 0.625, 0.0]))
    assert torch.equal(residual(p, p), p)
    assert acceptance(torch.tensor(0.0).log(), torch.tensor(0.3).log()) == 0
    assert acceptance(torch.tensor(0.4).log(), torch.tensor(0.3).log()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_rejection_as_run_has_the_targets_law(kind: str) -> None:
    """χ² of the first three tokens (64 cells), n = 100,000 chains in one batch, false alarm 1e-4 a case, seed fixed.

    Where q has no mass on a token for any context, the draft vocabulary does not hold it.
    """
    V, K, n = 4, 2, 100_000
    p, q = laws(kind, V, K)
    kept = [token for token in range(V) if any(float(x[token]) > 0 for x in q.values())]
    generator = torch.Generator().manual_seed(7)
    sample = lambda rows: torch.multinomial(rows, 1, generator=generator)[:, 0]  # noqa: E731
    table_p, table_q = (torch.stack([law[c] for c in contexts(V, K)]).float() for law in (p, q))
    offset = lambda tokens: _index(tokens, V)  # noqa: E731

    tokens = torch.zeros(n, 0, dtype=torch.long)
    for _ in range(K):
        tokens = torch.cat([tokens, sample(table_q[offset(tokens)])[:, None]], dim=1)
    prefixes = [tokens[:, :k] for k in range(K + 1)]
    logits = torch.stack([table_p[offset(c)].log() for c in prefixes], dim=1)  # [n, K + 1, V]
    draft_logp = torch.stack([table_q[offset(c)][:, kept].log() for c in prefixes[:K]], dim=1)  # [n, K, Vd]
    tree = as_tree([0] * (K + 1), [0, *range(K)], n)._replace(
        tokens=torch.cat([torch.full((n, 1), V - 1), tokens], dim=1)
    )
    law = TokenLaw(LogitsProcessorList(), 1.0, generator, frozenset())
    verdict = verify(tree, logits, [law] * n, lambda b: [], Chain(tree, draft_logp, torch.tensor(kept)))

    drafted = torch.cat([tokens, torch.zeros(n, 1, dtype=torch.long)], dim=1)
    output = drafted.scatter(1, verdict.counts[:, None] - 1, verdict.bonus[:, None])  # [n, K + 1]
    for length in range(1, K + 1):  # shorter outputs are completed by p
        more = sample(table_p[offset(output[:, :length])])
        output[:, length] = torch.where(verdict.counts <= length, more, output[:, length])
    counts = torch.bincount(output @ torch.tensor([V * V, V, 1]), minlength=V**3)
    exact = torch.tensor([probability(p, c) for c in itertools.product(range(V), repeat=K + 1)])
    assert p_value(counts, exact) > 1e-4
    if kind == "equal":
        assert (verdict.counts == K + 1).float().mean() > 0.9999  # p/q may round to just below 1
    if kind == "disjoint":
        assert (verdict.counts < K + 1).all()


def _index(tokens: Tensor, V: int) -> Tensor:
    """Place of contexts [n, k] in `contexts`, [n]."""
    k = tokens.shape[1]
    first = sum(V**i for i in range(k))
    return first + sum((tokens[:, i] * V ** (k - 1 - i) for i in range(k)), torch.zeros(len(tokens), dtype=torch.long))


def test_rejection_is_reproducible_and_shaped() -> None:
    logits = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    tree = as_tree([3, 0, 1], [0, 0, 1], 5)
    chain = Chain(tree, torch.full((5, 2, 2), 0.5).log(), torch.tensor([0, 1]))

    def run(seeds: list[int]):  # type: ignore[no-untyped-def]
        laws = [TokenLaw(LogitsProcessorList(), 1.0, torch.Generator().manual_seed(s), frozenset()) for s in seeds]
        return verify(tree, logits, laws, lambda b: [], chain)

    first, again = run([3, 4, 5, 6, 7]), run([3, 4, 5, 6, 7])
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert first.nodes.shape == (5, int(first.counts.max()))
    for b, count in enumerate(first.counts.tolist()):
        assert first.nodes[b, :count].tolist() == list(range(count))
    assert any(run([seed] * 5).bonus.tolist() != first.bonus.tolist() for seed in (1, 2))


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(TREES)))
def test_walk_equals_follow_and_asks_only_at_accepted_nodes(seed: int, name: str) -> None:
    """It asks for a choice at every accepted node once, in the order of the path."""
    tokens, parents, V = TREES[name]
    tree = as_tree(tokens, parents, rows=3)
    choice = torch.randint(V, (3, len(tokens)), generator=torch.Generator().manual_seed(seed))
    asked: list[list[int]] = [[] for _ in range(3)]

    def choose(rows: Tensor, nodes: Tensor) -> Tensor:
        for b, node in zip(rows.tolist(), nodes.tolist()):
            asked[b].append(node)
        return choice[rows, nodes]

    found, expected = walk(tree, choose), follow(tree, choice)
    assert torch.equal(found.counts, expected.counts) and torch.equal(found.bonus, expected.bonus)
    for b, count in enumerate(expected.counts.tolist()):
        assert found.nodes[b, :count].tolist() == expected.nodes[b, :count].tolist() == asked[b]


def test_draws_have_the_law_and_depend_only_on_the_rows_own_generator() -> None:
    """χ² of 20,000 draws (7 cells), false alarm 1e-4, fixed seed; draws do not depend on the other rows."""
    scores = torch.tensor([[0.0, 1.0, -2.0, 0.5, 3.0, float("-inf"), -1.0]])
    n, generator = 20_000, torch.Generator().manual_seed(0)
    p = probabilities(scores, [generator])
    torch.testing.assert_close(p, scores.softmax(-1))
    counts = torch.bincount(draw(p.expand(n, -1), [generator] * n), minlength=7)
    assert p_value(counts, p[0]) > 1e-4
    alone = [int(draw(p, [torch.Generator().manual_seed(seed)])) for seed in range(8)]
    assert len(set(alone)) > 1
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    assert draw(p.expand(8, -1), generators).tolist() == alone
    mixed = [None, *(torch.Generator().manual_seed(seed) for seed in range(1, 8))]
    assert draw(probabilities(scores.expand(8, -1), mixed), mixed).tolist() == [4, *alone[1:]]
    assert probabilities(scores.expand(2, -1), [None, generator])[0].tolist() == [0, 0, 0, 0, 1, 0, 0]


def test_unusable_logits_are_refused_by_kind() -> None:
    """NaN is the target's fault; a processor that forbids every token is the request's."""
    tree, logits = as_tree([3, 0], [0, 0]), torch.zeros(1, 2, 4)
    forbid = lambda ids, scores: scores.fill_(float("-inf"))  # noqa: E731
    law = TokenLaw(LogitsProcessorList([forbid]), 1.0, None, frozenset())
    with pytest.raises(ConfigurationError, match="leave no token"):
        verify(tree, logits, [law], lambda b: [])
    logits[0, 1, 2] = float("nan")
    with pytest.raises(TargetError, match="NaN"):
        verify(tree, logits, [law], lambda b: [])


def test_processors_see_the_path_of_the_walk_and_nothing_after_an_end_token() -> None:
    """The answer is 5, 6 on the tree; the bonus token after the end token 6 is not processed."""
    tree, logits = as_tree([4, 5, 6], [0, 0, 1]), torch.eye(8)[[5, 6, 7]][None]
    seen: list[list[int]] = []

    def spy(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids[0].tolist())
        return scores

    law = TokenLaw(LogitsProcessorList([spy]), 1.0, None, frozenset([6]))
    verdict = verify(tree, logits, [law], lambda b: [1, 4])
    assert verdict.nodes.tolist() == [[0, 1, 2]] and verdict.bonus.tolist() == [7]
    assert seen == [[1, 4], [1, 4, 5]]
