"""Paths and trees that the E-step drafts, for every family: their q, their law, and the trees of decoding."""

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import along
import seeing
import tiny
from vsd.drafters import FAMILIES, draft_vocabulary, lattice, new_drafter, of_label
from vsd.features import Features, Texts
from vsd.paths import Entries, TreeShape, leaf_paths
from vsd.targets import Target
from vsd.training.e_step.base import Batch, Models
from vsd.training.e_step.drafted import sample_paths
from vsd.training.e_step.proposed import trees

ROOTS = torch.tensor([[2, 9, 18], [0, 5, 11]])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def target(family: str) -> Target:
    return seeing.target("llava") if family == "vispec" else tiny.tiny_target()


@pytest.fixture(scope="module")
def drafter(family: str, target: Target) -> Any:
    torch.manual_seed(2)
    vocabulary = draft_vocabulary(torch.arange(15, 90), target.vocab_size, 50)
    scale = 0.1 if family == "vispec" else 0.5  # its states have no norm
    return new_drafter(target, vocabulary, family, initializer_range=scale).eval()


def models(target: Target, drafter: Any, temperature: float = 1.0) -> Models:
    return Models(target, drafter, "rejection", temperature, nullcontext)


def batch(target: Target, drafter: Any, steps: int, rows: int = 2) -> Batch:
    """Texts of 20 tokens."""
    ids = torch.randint(3, tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))[:rows]
    aux = target.features(along.text(ids), drafter.needs.layers).aux
    nothing = torch.zeros(rows, 1)
    texts = Texts(along.text(ids), torch.full((rows, 1), 2), torch.ones(rows, 1).bool(), torch.arange(rows))
    return Batch(texts, Features(aux, nothing, nothing), steps)


def law(drafter: Any, entries: Entries, roots: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """log q along paths by the training pass, [B, P, K, Vd]."""
    with torch.no_grad():
        logits: torch.Tensor = drafter(entries, along.paths(roots, tokens), lattice.logits)
        return (logits / temperature).log_softmax(-1).permute(1, 2, 0, 3)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_paths_carry_the_drafters_probabilities(target: Target, drafter: Any, temperature: float) -> None:
    """log q of sampling is log q of the training pass along the same paths."""
    some, roots = batch(target, drafter, 4), ROOTS.repeat_interleave(4, 1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    tokens, log_q = sample_paths(models(target, drafter, temperature), some, roots, 1.0, generators)
    labels = drafter.vocabulary.rows[tokens]
    assert int(labels.min()) >= 0
    wanted = of_label(law(drafter, some.entries, roots, tokens, temperature), labels, 0.0)
    torch.testing.assert_close(log_q, wanted, rtol=1e-4, atol=1e-5)
    asked = models(target, drafter).log_q(drafter, some, along.paths(roots, tokens))
    torch.testing.assert_close(asked, of_label(law(drafter, some.entries, roots, tokens, 1.0), labels, 0.0))


def test_paths_are_sampled_from_q_at_the_temperature(target: Target, drafter: Any) -> None:
    """First tokens of 4,000 paths below one root; total variation from the law is within chance (about 0.03)."""
    some, none = batch(target, drafter, 1, rows=1), torch.zeros(1, 1, 1, dtype=torch.long)

    def law_at(root: int, temperature: float) -> torch.Tensor:
        q = law(drafter, some.entries, torch.tensor([[root]]), none, 1.0)[0, 0, 0]
        return (q / temperature).softmax(-1)

    apart = (root for root in (9, *range(18)) if (law_at(root, 1.0) - law_at(root, 0.5)).abs().sum() / 2 > 0.1)
    root = next(apart)
    for temperature in (1.0, 0.5):
        generators, roots = [torch.Generator().manual_seed(0)], torch.full((1, 4000), root)
        tokens, _ = sample_paths(models(target, drafter), some, roots, temperature, generators)
        labels = drafter.vocabulary.rows[tokens[0, :, 0]]
        found = torch.bincount(labels, minlength=drafter.vocabulary.size) / 4000
        assert (found - law_at(root, temperature)).abs().sum() / 2 < 0.06


def test_trees_at_roots_are_decodings_trees(target: Target, drafter: Any) -> None:
    """Against the state that decoding would have reached, root by root."""
    some, shape, roots = batch(target, drafter, 4), TreeShape(4, 3, 12), torch.tensor([[2, 17, 9], [0, 5, 11]])
    with torch.no_grad():
        tokens, fresh = trees(models(target, drafter), drafter, shape, some, roots)
    ids = some.texts.inputs.ids
    for b, a in itertools.product(range(2), range(3)):
        n = int(roots[b, a]) + 1
        with torch.no_grad():
            prompt, aux = along.text(ids[b : b + 1, :n]), some.features.aux[b : b + 1, :n]
            state = drafter.begin(prompt, aux, ids[b, n : n + 1], n + 12)
            tree = drafter.propose(state, ids[b, n : n + 1], shape)
        wanted = leaf_paths(tree, 4)[0][0].tolist()
        found = tokens[b, a].tolist()
        assert sorted(path for path in found if path[0] >= 0) == sorted(wanted)
        assert int(fresh[b, a].sum()) == 11
