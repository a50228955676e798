"""Target features on disk: computed once, read in every epoch and by every drafter trained on the same text.

A store is a folder of safetensors shards (bfloat16, memory-mapped when read) and a manifest that names the target, its
chat template and the text by fingerprint, so that features of another model can never be trained on by mistake.

Reading needs embedding, final norm and LM head of the target (`TargetInfo`); computing needs the target.

Legend: B batch, T tokens, Q drafted tokens, h hidden.
"""

import hashlib
import json
import os
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vsd.data import Example, Examples
from vsd.errors import ConfigurationError, MismatchError, TargetError
from vsd.features.base import Features, Texts, compute_features, stacked
from vsd.files import gate_of, gated, write_text, writing
from vsd.progress import track
from vsd.targets import Padded, Target, TargetInfo

_SHARD_TOKENS = 32768
_BATCH_TOKENS = 2048


class FeatureStore:
    """Features of a list of examples, by index. The constructor opens a store; `build` computes missing shards first.

    Args:
        layers: decoder layers, by input index, that the drafter reads.
        temperature: at which the target is served.

    Raises:
        MismatchError: the folder holds features of another target, template, text or temperature, or is not complete.
    """

    def __init__(
        self,
        folder: str | Path,
        target: TargetInfo,
        examples: Sequence[Example],
        layers: tuple[int, ...],
        temperature: float = 1.0,
    ) -> None:
        self.folder, examples = Path(folder), Examples.of(examples)
        if not self.complete(folder, examples):
            raise MismatchError(f"no complete feature store at '{folder}'")
        _compare(self.folder, _read_manifest(self.folder), _manifest(target, examples, layers, temperature))
        self._plan = Plan.of(examples)
        for s, (tokens, rows) in enumerate(self._plan.sizes):
            _check_shard(self.folder / _name(s), tokens, rows, target.hidden_size, len(layers))
        self._shards: dict[int, Any] = {}

    @classmethod
    def build(
        cls,
        folder: str | Path,
        target: Target,
        examples: Sequence[Example],
        layers: tuple[int, ...],
        temperature: float = 1.0,
        worker: tuple[int, int] = (0, 1),
        meet: Callable[[], None] = lambda: None,
    ) -> "FeatureStore":
        """Compute the shards that `folder` lacks (all, after a kill only the rest) and open the store.

        Args:
            worker: (i, n): this is the i-th of n processes, each of which computes every n-th shard.
            meet: waits for all of them.

        Raises:
            ConfigurationError: the disk has no room for them.
            MismatchError: see the class.
        """
        folder, examples = Path(folder), Examples.of(examples)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        manifest, path = _manifest(target, examples, layers, temperature), folder / "manifest.json"
        if path.exists():
            _compare(folder, _read_manifest(folder), manifest)
        _check_room(folder, cls.missing_bytes(folder, target, examples, layers))
        if not path.exists():
            write_text(path, json.dumps(manifest, indent=1))
        plan, (index, workers) = Plan.of(examples), worker
        missing = [s for s in range(index, len(plan.sizes), workers) if not (folder / _name(s)).exists()]
        for s in track(missing, "target features", enabled=index == 0):
            chosen = list(examples[plan.first[s] : plan.first[s + 1]])
            _write_shard(folder / _name(s), partial(_shard, target, chosen, layers, temperature))
        meet()
        for s in range(len(plan.sizes)):  # of runs that were killed before they deleted it
            gate_of(folder / _name(s)).unlink(missing_ok=True)
        return cls(folder, target, examples, layers, temperature)

    @staticmethod
    def complete(folder: str | Path, examples: Sequence[Example]) -> bool:
        """Whether all shards of a store of these examples are there."""
        files = ["manifest.json", *(_name(s) for s in range(len(Plan.of(examples).sizes)))]
        return all((Path(folder) / file).exists() for file in files)

    @staticmethod
    def missing_bytes(
        folder: str | Path, target: TargetInfo, examples: Sequence[Example], layers: tuple[int, ...]
    ) -> int:
        """What `build` will add to `folder`: bfloat16 features of every token, of drafted ones hidden states, too."""
        token, row = 2 * target.hidden_size * len(layers), 2 * target.hidden_size + 4
        sizes = [size for s, size in enumerate(Plan.of(examples).sizes) if not (Path(folder) / _name(s)).exists()]
        return sum(tokens * token + rows * row for tokens, rows in sizes)

    def batch(self, texts: Texts) -> Features:
        """See `FeatureSource.batch`."""
        return stacked([self._read(i) for i in texts.examples.tolist()], texts)

    def _read(self, index: int) -> Features:
        s, (token, tokens), (row, rows) = self._plan.place(index)
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
    examples = Examples.of(examples)
    probe = examples[:16]
    start = time.perf_counter()
    _shard(target, list(probe), (), 1.0)
    cost = (time.perf_counter() - start) / int(probe.lengths.sum())
    return max(len(probe), int((examples.lengths.cumsum(0) * cost <= seconds).sum()))


def _write_shard(path: Path, compute: Callable[[], dict[str, Tensor]]) -> None:
    """Write a shard whole, unless another run that shares the store writes it meanwhile.

    Raises:
        FileError: it cannot be written.
    """
    half = path.with_name(f"{path.name}.part")
    with gated(path):  # the lock is not `half`'s: saving may put another file in its place
        try:
            if not path.exists():
                save_file(compute(), half)
                os.replace(half, path)
        finally:
            half.unlink(missing_ok=True)


def _shard(target: Target, examples: list[Example], layers: tuple[int, ...], temperature: float) -> dict[str, Tensor]:
    """Features of some examples, concatenated in their order."""
    done: dict[int, tuple[Tensor, ...]] = {}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].inputs.ids))
    for group in _batches(order, [len(examples[i].inputs.ids) for i in order], _BATCH_TOKENS):
        inputs = Padded.of([examples[i].inputs for i in group], target.device)
        places = [torch.tensor(examples[i].drafted).nonzero()[:, 0] for i in group]
        drafted = torch.nn.utils.rnn.pad_sequence(places, True, 2).to(target.device)
        features = compute_features(target, inputs, drafted, layers, temperature)
        for b, i in enumerate(group):
            aux, hidden, normaliser = (f[b].cpu() for f in features)
            if not normaliser[: len(places[b])].isfinite().all():
                raise TargetError("the target computes NaN or infinity: give --dtype float32, or other weights")
            T, Q = len(examples[i].inputs.ids), len(places[b])
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


class Plan(NamedTuple):
    """Which examples a shard holds, and where.

    Attributes:
        first: of every shard the first example, and behind them the number of examples.
        sizes: tokens and drafted tokens of every shard.
        ends: tokens and drafted tokens before every example, and of all, each [n + 1].
    """

    first: list[int]
    sizes: list[tuple[int, int]]
    ends: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Plan":
        """Examples in their order, as many as a shard takes."""
        found = Examples.of(examples)
        first, tokens = [0], 0
        for i, length in enumerate(found.lengths.tolist()):
            if tokens and tokens + length > _SHARD_TOKENS:
                first.append(i)
                tokens = 0
            tokens += length
        first.append(len(found))
        ends = (F.pad(lengths.cumsum(0), (1, 0)) for lengths in (found.lengths, found.drafted_lengths))
        token, row = ends
        sizes = zip(token[first].diff().tolist(), row[first].diff().tolist())
        return cls(first, list(sizes), (token, row))

    def place(self, index: int) -> tuple[int, tuple[int, int], tuple[int, int]]:
        """An example's shard, (first token, tokens) and (first drafted row, drafted rows) in it."""
        s = bisect_right(self.first, index) - 1
        token, row = (
            (int(ends[index] - ends[self.first[s]]), int(ends[index + 1] - ends[index])) for ends in self.ends
        )
        return s, token, row


def _manifest(target: TargetInfo, examples: Examples, layers: tuple[int, ...], temperature: float) -> dict[str, str]:
    template = str(getattr(target.tokenizer, "chat_template", None)).encode()
    return {
        "target": target.fingerprint(layers),
        "template": hashlib.sha256(template).hexdigest()[:16],
        "text": examples.digest,
        "temperature": f"{temperature:g}",
    }


def _check_shard(path: Path, tokens: int, rows: int, width: int, layers: int) -> None:
    """Refuse a file that does not hold features of so many tokens and drafted tokens; only its header is read.

    Raises:
        MismatchError: it is truncated, or tensors have another shape.
    """
    wanted = {"aux": [tokens, layers * width], "hidden": [rows, width], "log_normaliser": [rows]}
    try:
        with safe_open(path, "pt") as shard:
            found = {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MismatchError(f"'{path}' is damaged ({error}): delete it, and it is computed again") from error
    if found != wanted:
        raise MismatchError(f"'{path}' holds {found}, not {wanted}: delete it, and it is computed again")


def _read_manifest(folder: Path) -> dict[str, str]:
    """Stores of version 0.1 that name no temperature were made for 1."""
    try:
        return {"temperature": "1", **json.loads((folder / "manifest.json").read_text())}
    except (OSError, ValueError, TypeError) as error:
        raise MismatchError(f"manifest.json of the feature store at '{folder}' is damaged: delete the store") from error


def _compare(folder: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    other = [what for what in wanted if found.get(what) != wanted[what]]
    if other:
        raise MismatchError(
            f"the feature store at '{folder}' was made with another {' and '.join(other)}: "
            "give another folder, or delete this one"
        )


def _check_room(folder: Path, missing: int) -> None:
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise ConfigurationError(
            f"the target's features of this text take {missing / 1e9:.1f} GB, and '{folder}' has {free / 1e9:.1f} GB "
            "free: give --features online, or a folder on a larger disk"
        )


def _name(shard: int) -> str:
    return f"features-{shard:05d}.safetensors"
