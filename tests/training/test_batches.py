"""Batches of similar length: whole ones, so that any number of processes divides them alike."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vsd.training.batch import in_batches


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(2, 500), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 10**6))
def test_batches_are_whole_and_hold_every_text(lengths: list[int], size: int, seed: int) -> None:
    n = len(lengths)
    found = in_batches(torch.tensor(lengths), size, torch.Generator().manual_seed(seed))
    count = Counter(found)
    assert len(found) == -(-n // size) * size and set(found) == set(range(n))
    assert max(count.values()) - min(count.values()) <= 1


def test_a_batch_holds_texts_of_similar_length() -> None:
    """Noise of 10 % exchanges neighbours alone; batches come in random order."""
    lengths = torch.tensor([2**i for i in range(3, 11)])  # no two within 10 %
    batches = [in_batches(lengths, 2, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(sorted([sorted(x) for x in zip(b[::2], b[1::2])]) == [[0, 1], [2, 3], [4, 5], [6, 7]] for b in batches)
    assert len({tuple(batch) for batch in batches}) > 10
