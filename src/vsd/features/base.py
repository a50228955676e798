"""Target features of training texts, and the role of their source.

Legend: B batch, T tokens, Q drafted tokens of a sequence, n h width of the features, h hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vsd.targets import Output, Padded, Prefill, Target


class Texts(NamedTuple):
    """A batch of training texts.

    Attributes:
        inputs: B sequences of T tokens.
        drafted: positions of the drafted tokens, ascending, [B, Q]; padded with 2.
        real: which of them are not padding, [B, Q] bool.
        examples: their indices in the data set, [B].
    """

    inputs: Padded
    drafted: Tensor
    real: Tensor
    examples: Tensor

    def some(self, rows: list[int]) -> "Texts":
        """Only these texts."""
        return Texts(self.inputs.only(rows), self.drafted[rows], self.real[rows], self.examples[rows])


class Features(NamedTuple):
    """The target's side of a batch.

    Attributes:
        aux: features that the drafter reads, [B, T, n h].
        hidden: final hidden states at the positions just before the drafted ones, which predict them, [B, Q, h].
        log_normaliser: logsumexp of the logits of each, at the served temperature, [B, Q].
    """

    aux: Tensor
    hidden: Tensor
    log_normaliser: Tensor


class FeatureSource(Protocol):
    """Yields the features of any batch of the texts it was made for."""

    def batch(self, texts: Texts) -> Features:
        """In float32, on the device of the texts."""


class InProcess:
    """The target computes features when they are asked for.

    Args:
        layers: decoder layers, by input index, that the drafter reads.
        temperature: at which the target is served.
    """

    def __init__(self, target: Target, layers: tuple[int, ...], temperature: float = 1.0) -> None:
        self.target, self.layers, self.temperature = target, layers, temperature

    def batch(self, texts: Texts) -> Features:
        """See `FeatureSource.batch`."""
        return self._of(self.target.features(texts.inputs, self.layers), texts)

    def prefilled(self, texts: Texts, room: int) -> tuple[Features, Prefill]:
        """The features and, of the same pass, the target's cache of the texts with `room` more slots."""
        prefill, aux = self.target.read(texts.inputs, room, self.layers)
        return self._of(Output(prefill.hidden, aux), texts), prefill

    def _of(self, output: Output, texts: Texts) -> Features:
        return Features(*(field.float() for field in _of_pass(self.target, output, texts.drafted, self.temperature)))


def compute_features(
    target: Target, inputs: Padded, drafted: Tensor, layers: tuple[int, ...], temperature: float = 1.0
) -> Features:
    """One target pass over texts with drafted positions [B, Q]."""
    return _of_pass(target, target.features(inputs, layers), drafted, temperature)


@torch.no_grad()
def _of_pass(target: Target, output: Output, drafted: Tensor, temperature: float) -> Features:
    before = (drafted - 1)[..., None].expand(-1, -1, output.hidden.shape[-1])
    hidden = output.hidden.gather(1, before)
    normaliser = target.log_normaliser(hidden.flatten(0, 1), temperature)
    return Features(output.aux, hidden, normaliser.view(drafted.shape))


def stacked(pieces: Sequence[Features], texts: Texts) -> Features:
    """Stored features of single texts as a batch. They are copied to the device as they are, and widened there."""
    T, Q = texts.inputs.ids.shape[1], texts.drafted.shape[1]
    columns = zip(zip(*pieces), (T, Q, Q))
    return Features(*(padded(column, size, texts.drafted.device).float() for column, size in columns))


def padded(rows: Sequence[Tensor], length: int, device: torch.device) -> Tensor:
    """Tensors [length or less, …] stacked on the device, zeros behind them.

    A copy to a GPU starts from pinned memory, and nothing waits for it.
    """
    whole = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for b, one in enumerate(rows):
        whole[b, : len(one)] = one
    return (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)
