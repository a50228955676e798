"""Prompt lookup (Saxena, 2023), or n-gram speculation: the last tokens are searched in the preceding text.

The tokens after the last match are the draft. Prompt lookup needs no model. Its drafts are long and often accepted in
repetitive text: code, quotations, lists. A drafter predicts a few tokens in any text; one tree can hold both drafts.
"""

from collections.abc import Sequence

from torch import Tensor

_LONGEST, _SHORTEST = 4, 2  # length of a matching n-gram, in tokens
SURE = 3  # from this match length on, decoding uses the copy alone and does not call the drafter


class Lookup:
    """Finds the previous occurrence of the last tokens, in constant time per token."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.follows: dict[tuple[int, ...], int] = {}  # index of the token after the n-gram
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            for n in range(_SHORTEST, _LONGEST + 1):
                if len(self.tokens) >= n:
                    self.follows[tuple(self.tokens[-n:])] = len(self.tokens)
            self.tokens.append(token)

    def propose(self, count: int) -> tuple[list[int], int]:
        """At most `count` draft tokens, and the length of the matching n-gram (0: no match)."""
        for n in range(min(_LONGEST, len(self.tokens)), _SHORTEST - 1, -1):
            start = self.follows.get(tuple(self.tokens[-n:]))
            if start is not None:
                return self.tokens[start : start + count], n
        return [], 0


def looked_up(ids: Tensor) -> Tensor:
    """Positions in texts ids [B, T] where decoding copies without the drafter: the last `SURE` tokens match."""
    same = ids[:, :, None] == ids[:, None]  # [B, T, T]
    alike = same.clone()
    for back in range(1, SURE):
        alike[:, back:, back:] &= same[:, :-back, :-back]
        alike[:, :back] = False
        alike[:, :, :back] = False
    return alike.tril(-1).any(-1)
