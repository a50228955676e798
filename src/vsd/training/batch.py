"""From examples to padded batches.

Legend: B batch, T longest sequence, Q most drafted tokens of a sequence.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from vsd.data import Example, Examples
from vsd.drafters import DraftVocabulary, most_frequent
from vsd.errors import DataError
from vsd.features import Texts
from vsd.targets import Padded

IGNORED = -100  # label of a token that is not drafted, the value that transformers uses


class DraftDataset(Dataset[dict[str, Any]]):
    """Examples, indexed for the trainer's sampler."""

    def __init__(self, examples: Sequence[Example]) -> None:
        if not len(examples):
            raise DataError("there is nothing to train on")
        self.examples = Examples.of(examples)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example and its index."""
        return {"example": self.examples[index], "index": index}

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self.examples.lengths.max())

    @property
    def drafted_tokens(self) -> int:
        """Number of supervised tokens."""
        return int(self.examples.drafted_lengths.sum())

    def draft_vocabulary(self, vocab_size: int, size: int) -> DraftVocabulary:
        """The `size` supervised tokens that are most frequent; see `vsd.drafters.most_frequent`."""
        return most_frequent(self.examples.drafted_counts(vocab_size), size)


class ByLength(Sampler[int]):
    """Batches of similar length in random order. The order depends on `seed` alone, so a resumed epoch keeps it."""

    def __init__(self, batch_size: int, dataset: DraftDataset, seed: Callable[[], int]) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.lengths = dataset.examples.lengths

    def __len__(self) -> int:
        """Number of examples in whole batches."""
        return -(-len(self.lengths) // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """Indices, batch after batch."""
        yield from in_batches(self.lengths, self.batch_size, torch.Generator().manual_seed(self.seed()))


def in_batches(lengths: Tensor, batch_size: int, generator: torch.Generator) -> list[int]:
    """Indices of texts of lengths [n] in batches of similar length in random order.

    Every batch is whole, so that any number of processes can share it: some texts, chosen at random, come twice (or
    more often, where n < batch_size). Random noise of 10 % is added to the lengths before sorting, so that every epoch
    has different batches.
    """
    n, count = len(lengths), -(-len(lengths) // batch_size)
    jitter = 1 + 0.1 * torch.rand(count * batch_size, generator=generator)
    order = torch.randperm(count, generator=generator)
    rounds = [torch.randperm(n, generator=generator) for _ in range(n, count * batch_size, n)]
    texts = torch.cat([torch.arange(n), *rounds])[: count * batch_size]
    batches = texts[(lengths[texts] * jitter).argsort()].view(count, batch_size)
    return batches[order].flatten().tolist()


class Unread:
    """Extras of a batch: the trainer moves what it knows to the device, and would read them for that."""

    def __init__(self, extras: Sequence[Mapping[str, Tensor]]) -> None:
        self.extras = extras


class Collator:
    """Pads examples.

    Yields index [B] of the examples; input_ids [B, T], lengths [B], positions [B, T] or [R, B, T] and extras, the
    fields of `Padded`; labels [B, T], the token where drafted, else -100; drafted [B, Q], positions of the drafted
    tokens, padded with 2.
    """

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch from dataset items."""
        inputs = Padded.of([item["example"].inputs for item in items])
        labels = torch.full_like(inputs.ids, IGNORED)
        for b, item in enumerate(items):
            mask = torch.tensor(item["example"].drafted)
            labels[b, : len(mask)][mask] = inputs.ids[b, : len(mask)][mask]
        index = torch.tensor([item["index"] for item in items])
        fields = {"input_ids": inputs.ids, "lengths": inputs.lengths, "positions": inputs.positions}
        return {
            "index": index,
            **fields,
            "extras": Unread(inputs.extras),
            "labels": labels,
            "drafted": _positions(labels),
        }


def announced(expect: Callable[[Texts], None]) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """A collator that announces texts when their batch is made: a batch ahead, in the trainer's own process."""

    def collated(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = Collator()(items)
        if get_worker_info() is None:
            expect(texts_of(batch))
        return batch

    return collated


def texts_of(batch: dict[str, Any]) -> Texts:
    """The texts of a collated batch."""
    inputs = Padded(batch["input_ids"], batch["lengths"], batch["positions"], batch["extras"].extras)
    return Texts(inputs, batch["drafted"], real(batch), batch["index"])


def _positions(labels: Tensor) -> Tensor:
    """Positions of the labelled tokens, ascending, [B, Q]; padded with 2, the first position that can be drafted."""
    rows = [(row != IGNORED).nonzero()[:, 0] for row in labels]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=2)


def real(batch: dict[str, Tensor]) -> Tensor:
    """Mask of the drafted positions [B, Q] that are not padding: real positions increase, padding does not."""
    drafted = batch["drafted"]
    rising = torch.ones_like(drafted, dtype=torch.bool)
    rising[:, 1:] = drafted[:, 1:] > drafted[:, :-1]
    return (batch["labels"].gather(1, drafted) >= 0) & rising
