"""What followed the newest tokens where they stood before."""

from hypothesis import given
from hypothesis import strategies as st

from vsd.decoding.lookup import Lookup


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
