"""The inputs of a model: token ids with their positions, and whatever else the prompt's pass reads.

Every layer hands these on whole, so that a new kind of input (pixel values of images) changes only its producer, the
data layer, and its consumer, the target.

Legend: B sequences, N tokens of the longest one, R rows of positions (3 for M-RoPE).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Lazy(Mapping[str, Tensor]):
    """Tensors of things in a text (images), computed from the things when they are read.

    Args:
        things: in their order in the text.
        starts: index of each one's first token.
        load: computes the tensors of some things, which has to be cheap for those asked for just before.
        digest: changes with the tensors of all things.
    """

    def __init__(
        self,
        things: tuple[Any, ...],
        starts: tuple[int, ...],
        load: Callable[[tuple[Any, ...]], dict[str, Tensor]],
        digest: Callable[[tuple[Any, ...]], bytes],
    ) -> None:
        self.things, self.starts, self._load, self._digest = things, starts, load, digest

    def __getitem__(self, name: str) -> Tensor:
        return self._load(self.things)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load(self.things))

    def __len__(self) -> int:
        return len(self._load(self.things))

    def __bool__(self) -> bool:
        return bool(self.things)

    def upto(self, end: int) -> Mapping[str, Tensor]:
        """Of the things that start before token `end`."""
        starts = tuple(start for start in self.starts if start < end)
        return Lazy(self.things[: len(starts)], starts, self._load, self._digest) if starts else {}

    @property
    def digest(self) -> bytes:
        """Changes with the tensors; computes none of them."""
        return self._digest(self.things)


class Inputs(NamedTuple):
    """One sequence.

    Attributes:
        ids: token ids.
        positions: [N] or [R, N]; None: 0 … N - 1.
        extras: further arguments of the model's `forward` for the pass that reads the prompt, such as pixel values.
            Those of several sequences are concatenated along their first dimension. Images are decoded when these are
            read.
    """

    ids: list[int]
    positions: Tensor | None = None
    extras: Mapping[str, Tensor] = {}

    def followed_by(self, ids: Sequence[int]) -> "Inputs":
        """The sequence with more text behind it: each token's position is one above the largest before."""
        if self.positions is None:
            return self._replace(ids=[*self.ids, *ids])
        more = int(self.positions.max()) + 1 + torch.arange(len(ids), device=self.positions.device)
        positions = torch.cat([self.positions, more.expand(*self.positions.shape[:-1], -1)], dim=-1)
        return self._replace(ids=[*self.ids, *ids], positions=positions)

    def upto(self, end: int) -> "Inputs":
        """Its first `end` tokens, which cut no image."""
        positions = None if self.positions is None else self.positions[..., :end]
        extras = self.extras.upto(end) if isinstance(self.extras, Lazy) else self.extras
        return Inputs(self.ids[:end], positions, extras)

    @property
    def digest(self) -> bytes:
        """Changes with what the prompt's pass reads besides tokens; empty for text."""
        if isinstance(self.extras, Lazy):
            return self.extras.digest
        tensors = (name.encode() + tensor.cpu().numpy().tobytes() for name, tensor in sorted(self.extras.items()))
        return hashlib.sha256(b"".join(tensors)).digest() if self.extras else b""


class Padded(NamedTuple):
    """A batch of sequences, padded on the right.

    Attributes:
        ids: [B, N].
        lengths: [B].
        positions: [B, N] or [R, B, N]; padding continues the sequence.
        extras: as in `Inputs`, of every sequence; () where all are text. Nothing is read before a pass needs it.
    """

    ids: Tensor
    lengths: Tensor
    positions: Tensor
    extras: Sequence[Mapping[str, Tensor]]

    @classmethod
    def of(cls, sequences: Sequence[Inputs], device: torch.device | str = "cpu") -> "Padded":
        """Pad and stack sequences."""
        lengths = [len(sequence.ids) for sequence in sequences]
        width = max(lengths)
        filled = [sequence.followed_by([0] * (width - len(sequence.ids))) for sequence in sequences]
        positions = [torch.arange(width) if one.positions is None else one.positions for one in filled]
        extras = [one.extras for one in sequences]
        return cls(
            torch.tensor([one.ids for one in filled], device=device),
            torch.tensor(lengths, device=device),
            torch.stack(torch.broadcast_tensors(*positions), dim=-2).to(device),
            extras if any(extras) else (),
        )

    @property
    def first_row(self) -> Tensor:
        """Positions [B, N]: the only row, or the first of several, as drafters with plain rotary embeddings use it."""
        return self.positions if self.positions.dim() == 2 else self.positions[0]

    @property
    def merged(self) -> dict[str, Tensor]:
        """`extras` of all sequences, as the model reads them."""
        read = [dict(one) for one in self.extras if one]
        names = dict.fromkeys(name for one in read for name in one)
        return {name: _joined([one[name] for one in read if name in one]).to(self.ids.device) for name in names}

    def only(self, rows: Tensor | list[int]) -> "Padded":
        """Some rows of a batch."""
        chosen = rows.tolist() if isinstance(rows, Tensor) else rows
        extras = [self.extras[row] for row in chosen] if self.extras else ()
        return Padded(self.ids[rows], self.lengths[rows], self.positions[..., rows, :], extras)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Concatenated along the first dimension; in the others smaller ones are padded with zeros, as processors do."""
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
    missing = ([size - own for size, own in zip(sizes, tensor.shape[1:])] for tensor in tensors)
    return torch.cat([F.pad(x, [n for more in reversed(few) for n in (0, more)]) for x, few in zip(tensors, missing)])
