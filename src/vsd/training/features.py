"""Target features on disk: computed once, read by every epoch and every drafter trained on the same text.

A store is a folder of safetensors shards (bfloat16, memory-mapped when read) and a manifest that names the target, its
chat template and the text by fingerprint, so that features of another model can never be trained on by mistake.

Legend: B batch, T tokens, Q drafted tokens, h hidden.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vsd.data import Example
from vsd.errors import VSDError
from vsd.targets import Target

_SHARD_TOKENS = 32768
_BATCH_TOKENS = 2048


class Features(NamedTuple):
    """What training needs from the target: aux [B, T, 3h]; hidden [B, Q, h] and log_normaliser [B, Q] of the
    positions just before the drafted ones, where the target predicts them: logsumexp of its logits at the temperature
    it is served at."""

    aux: Tensor
    hidden: Tensor
    log_normaliser: Tensor


@torch.no_grad()
def compute_features(target: Target, input_ids: Tensor, drafted: Tensor, temperature: float = 1.0) -> Features:
    """One target pass over right-padded input_ids [B, T] with drafted positions [B, Q]."""
    output = target.features(input_ids)
    before = (drafted - 1)[..., None].expand(-1, -1, output.hidden.shape[-1])
    hidden = output.hidden.gather(1, before)
    normaliser = target.log_normaliser(hidden.flatten(0, 1), temperature)
    return Features(output.aux, hidden, normaliser.view(drafted.shape))


class FeatureStore:
    """Features of a list of examples, by index; `build` computes what is missing, the constructor reads.

    Raises:
        VSDError: the folder holds features of another target, template or text, or for another temperature.
    """

    def __init__(self, folder: Path, target: Target, examples: Sequence[Example], temperature: float = 1.0) -> None:
        self.folder = folder
        manifest = _manifest(target, examples, temperature)
        try:
            found = _read_manifest(folder)
        except FileNotFoundError:
            raise VSDError(f"no feature store at '{folder}'") from None
        _compare(folder, found, manifest)
        self._places = dict(_places(examples))
        self._shards: dict[int, Any] = {}

    @classmethod
    def build(
        cls,
        folder: str | Path,
        target: Target,
        examples: Sequence[Example],
        temperature: float = 1.0,
        worker: tuple[int, int] = (0, 1),
    ) -> "FeatureStore":
        """Compute the shards that `folder` lacks (all, after a kill only the rest) and open the store.

        Worker (i, n) of n computes every n-th; read only when all of them are done.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        manifest, path = _manifest(target, examples, temperature), folder / "manifest.json"
        if path.exists():
            _compare(folder, _read_manifest(folder), manifest)
        else:
            half = folder / f"{path.name}.{os.getpid()}"
            half.write_text(json.dumps(manifest, indent=1))
            os.replace(half, path)
        shards, (index, workers) = _shards(examples), worker
        missing = [s for s in range(index, len(shards), workers) if not (folder / _name(s)).exists()]
        for s in track(missing, "target features", disable=not missing or index > 0):
            half = folder / f"{_name(s)}.part"
            save_file(_shard(target, [examples[i] for i in shards[s]], temperature), half)
            os.replace(half, folder / _name(s))
        return cls(folder, target, examples, temperature)

    def batch(self, indices: list[int], T: int, Q: int) -> dict[str, Tensor]:
        """Padded features of some examples, as `Features` fields by name, in float32."""
        pieces = [self._read(i) for i in indices]
        return {
            name: torch.stack([_pad(piece[f].float(), Q if f else T) for piece in pieces])
            for f, name in enumerate(Features._fields)
        }

    def _read(self, index: int) -> Features:
        s, (token, tokens), (row, rows) = self._places[index]
        if s not in self._shards:
            self._shards[s] = safe_open(self.folder / _name(s), "pt")
        shard = self._shards[s]
        return Features(
            shard.get_slice("aux")[token : token + tokens],
            shard.get_slice("hidden")[row : row + rows],
            shard.get_slice("log_normaliser")[row : row + rows],
        )


def affordable(target: Target, examples: Sequence[Example], seconds: float) -> int:
    """How many of the first `examples` have their features computed within `seconds`, by timing a few."""
    probe = list(examples[:16])
    start = time.perf_counter()
    _shard(target, probe)
    cost = (time.perf_counter() - start) / sum(len(example.inputs.ids) for example in probe)
    lengths = accumulate(len(example.inputs.ids) for example in examples)
    return max(len(probe), sum(length * cost <= seconds for length in lengths))


def _shard(target: Target, examples: list[Example], temperature: float = 1.0) -> dict[str, Tensor]:
    """Features of some examples, concatenated in their order."""
    done: dict[int, tuple[Tensor, ...]] = {}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].inputs.ids))
    for group in _batches(order, [len(examples[i].inputs.ids) for i in order], _BATCH_TOKENS):
        ids = [torch.tensor(examples[i].inputs.ids) for i in group]
        drafted = [torch.tensor(examples[i].drafted).nonzero()[:, 0] for i in group]
        pad = torch.nn.utils.rnn.pad_sequence
        features = compute_features(
            target, pad(ids, batch_first=True).to(target.device), pad(drafted, True, 2).to(target.device), temperature
        )
        for b, i in enumerate(group):
            aux, hidden, normaliser = (f[b].cpu() for f in features)
            T, Q = len(ids[b]), len(drafted[b])
            done[i] = (aux[:T].bfloat16(), hidden[:Q].bfloat16(), normaliser[:Q].float())
    columns = zip(*(done[i] for i in range(len(examples))))
    return {name: torch.cat(column) for name, column in zip(Features._fields, columns)}


def _batches(items: list[int], lengths: list[int], limit: int) -> Iterator[list[int]]:
    """Consecutive items whose padded size stays within `limit` tokens (lengths ascending)."""
    batch: list[int] = []
    for item, length in zip(items, lengths):
        if batch and length * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _shards(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of the examples of every shard."""
    shards: list[list[int]] = [[]]
    tokens = 0
    for i, example in enumerate(examples):
        if shards[-1] and tokens + len(example.inputs.ids) > _SHARD_TOKENS:
            shards.append([])
            tokens = 0
        shards[-1].append(i)
        tokens += len(example.inputs.ids)
    return shards


def _places(
    examples: Sequence[Example],
) -> Iterator[tuple[int, tuple[int, tuple[int, int], tuple[int, int]]]]:
    """For every example its shard, (first token, tokens) and (first drafted row, drafted rows) in it."""
    for s, indices in enumerate(_shards(examples)):
        token = row = 0
        for i in indices:
            tokens, rows = len(examples[i].inputs.ids), sum(examples[i].drafted)
            yield i, (s, (token, tokens), (row, rows))
            token, row = token + tokens, row + rows


def _manifest(target: Target, examples: Sequence[Example], temperature: float) -> dict[str, str]:
    text = hashlib.sha256()
    for inputs, drafted in examples:
        text.update(json.dumps([inputs.ids, [int(d) for d in drafted]]).encode())
    template = str(getattr(target.tokenizer, "chat_template", None)).encode()
    return {
        "target": target.fingerprint(),
        "template": hashlib.sha256(template).hexdigest()[:16],
        "text": text.hexdigest()[:16],
        "temperature": f"{temperature:g}",
    }


def _read_manifest(folder: Path) -> dict[str, str]:
    """A store that names no temperature is from before there was one."""
    return {"temperature": "1", **json.loads((folder / "manifest.json").read_text())}


def _compare(folder: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    other = [what for what in wanted if found.get(what) != wanted[what]]
    if other:
        raise VSDError(
            f"the feature store at '{folder}' was made with another {' and '.join(other)}: "
            "give another folder, or delete this one"
        )


def _name(shard: int) -> str:
    return f"features-{shard:05d}.safetensors"


def _pad(x: Tensor, length: int) -> Tensor:
    """Zero-pad the first dimension to `length`."""
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])]) if len(x) < length else x
