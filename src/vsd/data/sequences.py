"""Training sequences: one of them, and many of them as flat arrays.

A token takes five bytes here, and none of the process's own where the arrays are mapped from a file
(`vsd.data.tokenized`); in Python lists it takes 48.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from vsd.targets.inputs import Inputs

_TOGETHER = 4096  # sequences that are counted at once
FILES = {"ids": np.int32, "drafted": np.bool_, "spans": np.int64}  # of mapped sequences, raw


class Example(NamedTuple):
    """One training sequence.

    Attributes:
        drafted: drafted[j] is True iff token j is drafted when the conversation is served.
        opening: 63-bit digest of the conversation up to its first answer: later turns, further answers to the same
            prompt and duplicates have the same one.
    """

    inputs: Inputs
    drafted: list[bool]
    opening: int = 0


def drafted_mask(prompt: int, answer: int) -> list[bool]:
    """Which tokens of a prompt and an answer are drafted: those of the answer but the first, which prefill yields.

    Args:
        prompt, answer: numbers of tokens.
    """
    return [False] * (prompt + 1) + [True] * (answer - 1)


class Examples(Sequence[Example]):
    """Training sequences.

    Args:
        ids: tokens of all sequences, [N] int32.
        drafted: which of them are drafted, [N] bool.
        spans: of every sequence the first token, the number of tokens, that of drafted ones and the opening, [n, 4]
            int64.
        shown: inputs of the sequences with images, by first token.
    """

    def __init__(self, ids: Any, drafted: Any, spans: Any, shown: Mapping[int, Inputs] = {}) -> None:
        self.ids, self.drafted, self.spans, self.shown = ids, drafted, spans, shown

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        """Single examples, copied into arrays."""
        if isinstance(examples, cls):
            return examples
        ids, drafted, spans, shown = array("i"), bytearray(), array("q"), dict[int, Inputs]()
        for inputs, mask, opening in examples:
            if inputs.extras or inputs.positions is not None:
                shown[len(ids)] = inputs
            spans.extend((len(ids), len(mask), sum(mask), opening))
            ids.extend(inputs.ids)
            drafted.extend(mask)
        arrays = np.array(ids, np.int32), np.array(drafted, np.bool_), np.array(spans, np.int64).reshape(-1, 4)
        return cls(*arrays, shown)

    @classmethod
    def mapped(cls, folder: Path) -> "Examples":
        """The sequences in a folder with `FILES`, read when they are needed."""
        ids, drafted, spans = (np.memmap(folder / name, kind, "r") for name, kind in FILES.items())
        return cls(ids, drafted, spans.reshape(-1, 4))

    def __len__(self) -> int:
        return len(self.spans)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        """One sequence as lists; a slice shares the arrays."""
        if isinstance(index, slice):
            return Examples(self.ids, self.drafted, self.spans[index], self.shown)
        start, count, _, opening = self.spans[index].tolist()
        here = slice(start, start + count)
        inputs = self.shown[start] if start in self.shown else Inputs(self.ids[here].tolist())
        return Example(inputs, self.drafted[here].tolist(), opening)

    def chosen(self, indices: Any) -> "Examples":
        """Some of the sequences, by their indices, [k]; the arrays are shared."""
        return Examples(self.ids, self.drafted, self.spans[np.array(indices, np.int64)], self.shown)

    @property
    def lengths(self) -> Tensor:
        """Tokens of every sequence, [n]."""
        return torch.from_numpy(self.spans[:, 1].copy())

    @property
    def drafted_lengths(self) -> Tensor:
        """Drafted tokens of every sequence, [n]."""
        return torch.from_numpy(self.spans[:, 2].copy())

    @property
    def openings(self) -> Any:
        """The opening of every sequence, [n] int64."""
        return self.spans[:, 3]

    def drafted_counts(self, vocab_size: int) -> Tensor:
        """How often every token is drafted, [V]."""
        counts = np.zeros(vocab_size, np.int64)
        for first in range(0, len(self), _TOGETHER):
            tokens = np.concatenate([*self._drafted(self.spans[first : first + _TOGETHER])])
            counts += np.bincount(tokens, minlength=vocab_size)
        return torch.from_numpy(counts)

    def _drafted(self, spans: Any) -> Iterator[Any]:
        """The drafted tokens of some sequences."""
        for start, count, *_ in spans.tolist():
            yield self.ids[start : start + count][self.drafted[start : start + count]]

    @cached_property
    def digest(self) -> str:
        """16 hex digits that change with the sequences, their order and their images."""
        found = hashlib.sha256()
        for start, count, *_ in self.spans.tolist():
            found.update(count.to_bytes(8, "little"))
            found.update(self.ids[start : start + count].tobytes())
            found.update(self.drafted[start : start + count].tobytes())
            if start in self.shown:
                found.update(self.shown[start].digest)
        return found.hexdigest()[:16]
