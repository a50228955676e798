"""Drafting from the text itself: what followed its newest words where they stood before.

Known as prompt lookup (Saxena, 2023) or n-gram speculation. It costs nothing, is long where it is right, and is right
where text repeats: code, quotations, lists. A drafter with one layer looks ahead a few tokens everywhere; the two
complement each other in one tree.
"""

from collections.abc import Sequence

from torch import Tensor

_LONGEST, _SHORTEST = 4, 2  # tokens that must be the same
SURE = 3  # behind so many, a copy is likelier right than what a drafter could add to it is worth


class Lookup:
    """Finds the last earlier occurrence of the newest tokens, in constant time a token."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.follows: dict[tuple[int, ...], int] = {}  # where the token behind an n-gram stands
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Read on."""
        for token in tokens:
            for n in range(_SHORTEST, _LONGEST + 1):
                if len(self.tokens) >= n:
                    self.follows[tuple(self.tokens[-n:])] = len(self.tokens)
            self.tokens.append(token)

    def propose(self, count: int) -> tuple[list[int], int]:
        """At most `count` tokens to go on with, and how many of the newest tokens stood before them (0: none did)."""
        for n in range(min(_LONGEST, len(self.tokens)), _SHORTEST - 1, -1):
            start = self.follows.get(tuple(self.tokens[-n:]))
            if start is not None:
                return self.tokens[start : start + count], n
        return [], 0


def looked_up(ids: Tensor) -> Tensor:
    """Where in texts ids [B, T] decoding would copy and not ask a drafter: `SURE` tokens up to here stood before."""
    same = ids[:, :, None] == ids[:, None]  # [B, T, T]
    alike = same.clone()
    for back in range(1, SURE):
        alike[:, back:, back:] &= same[:, :-back, :-back]
        alike[:, :back] = False
        alike[:, :, :back] = False
    return alike.tril(-1).any(-1)
