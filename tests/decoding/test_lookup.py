"""What followed the newest tokens where they stood before."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vsd.decoding.lookup import SURE, Lookup, looked_up


@given(st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=5), st.integers(1, 5))
def test_proposals_are_what_brute_force_finds(pieces: list[list[int]], count: int) -> None:
    lookup, text = Lookup(), []
    for piece in pieces:
        lookup.extend(piece)
        text += piece
        expected: tuple[list[int], int] = ([], 0)
        for n in (4, 3, 2):
            ends = [end for end in range(n, len(text)) if text[end - n : end] == text[-n:]]
            if ends:
                expected = text[ends[-1] : ends[-1] + count], n
                break
        assert lookup.propose(count) == expected


@given(st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=1, max_size=3))
def test_copied_is_where_decoding_would_not_ask_a_drafter(texts: list[list[int]]) -> None:
    expected = [[Lookup(text[: t + 1]).propose(1)[1] >= SURE for t in range(9)] for text in texts]
    assert looked_up(torch.tensor(texts)).tolist() == expected
