"""The draft vocabulary: which tokens are in, and the two tables that say so."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import along
import tiny
from vsd.drafters import draft_vocabulary
from vsd.drafters.eagle3 import Eagle3Drafter
from vsd.errors import VSDError
from vsd.targets import Target

V = 20


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, V - 1), min_size=1, max_size=60), st.integers(1, V))
def test_the_most_frequent_tokens_in_ascending_rows(tokens: list[int], size: int) -> None:
    found = draft_vocabulary(torch.tensor(tokens), V, size)
    d2t, t2d, coverage = found.d2t, found.t2d, found.coverage
    ids = (torch.arange(size) + d2t).tolist()
    counts = Counter(tokens)
    wanted = sorted(range(V), key=lambda token: (-counts[token], token))[:size]  # ties: the smaller id
    assert ids == sorted(wanted)
    assert (d2t.dtype, t2d.dtype, t2d.shape) == (torch.int64, torch.bool, (V,))
    assert t2d.nonzero()[:, 0].tolist() == ids == found.ids.tolist()
    assert [found.rows[token] for token in ids] == list(range(size)) and int((found.rows < 0).sum()) == V - size
    assert (d2t >= 0).all() and (d2t[1:] >= d2t[:-1]).all()
    assert coverage == pytest.approx(sum(counts[token] for token in ids) / len(tokens))


def test_ties_and_places_left_over_go_to_the_smaller_id() -> None:
    found = draft_vocabulary(torch.tensor([[9, 9, 7], [5, 7, 5]]), 12, 2)
    assert found.t2d.nonzero()[:, 0].tolist() == [5, 7]
    assert found.coverage == pytest.approx(4 / 6)
    assert draft_vocabulary(torch.tensor([9]), 12, 4).t2d.nonzero()[:, 0].tolist() == [0, 1, 2, 9]


@pytest.mark.parametrize(
    ("tokens", "size", "what"),
    [([1], 0, "vocabulary of 0"), ([1], V + 1, "vocabulary of 21"), ([], 4, "no supervised tokens")],
)
def test_impossible_vocabularies_are_refused(tokens: list[int], size: int, what: str) -> None:
    with pytest.raises(VSDError, match=what):
        draft_vocabulary(torch.tensor(tokens, dtype=torch.long), V, size)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_targets(tied: bool) -> None:
    """The drafter carries no embeddings, so nothing of its checkpoint depends on how the target keeps its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    target = Target(LlamaForCausalLM(config), tiny.tiny_tokenizer())
    assert (target.head_weight is target.embedding_weight) == tied
    drafter = Eagle3Drafter.for_target(target, draft_vocabulary(torch.arange(30), target.vocab_size, 16))
    assert not drafter.config.tie_word_embeddings
    assert not any("embed" in name for name in drafter.state_dict())
    drafter.attach(target)
    entries = along.entries(target, torch.arange(8)[None], drafter.needs.layers)
    found = along.states(drafter, entries, along.paths(torch.tensor([[2]]), torch.tensor([[[4]]])))
    assert found.shape == (1, 1, 1, 32)
