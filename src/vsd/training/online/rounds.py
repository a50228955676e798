"""Rounds of rollouts in a folder, and their features.

Every process answers a part of a round. Round n is round-n.json, the texts of all parts, and round-n.p.safetensors, the
features of part p, which are written first: a round whose texts are there is whole. A resumed run reads the rounds that
the interrupted one wrote, whatever the number of processes.

Legend: R the largest number of rollouts in a round; example n R + j is rollout j of round n.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from safetensors.torch import save_file

from vsd.data import Example, drafted_mask
from vsd.errors import ConfigurationError, MismatchError
from vsd.features import Features, Texts, stacked
from vsd.files import write_text
from vsd.targets import Inputs
from vsd.training.online.rollouts import Rollout


class Text(NamedTuple):
    """A rollout without its features."""

    prompt: list[int]
    response: list[int]
    passes: int

    @property
    def example(self) -> Example:
        """The prompt and its answer as a training text."""
        return Example(Inputs(self.prompt + self.response), drafted_mask(len(self.prompt), len(self.response)))


class Rounds:
    """The rounds in a folder; a `FeatureSource`.

    Args:
        size: R.
        origin: what the rounds depend on, by name; the folder's manifest.

    Raises:
        ConfigurationError: not all processes see the folder.
        MismatchError: the folder holds rounds of another origin.
    """

    def __init__(self, folder: Path, size: int, origin: Mapping[str, str]) -> None:
        self.folder, self.size = folder, size
        self.texts: dict[int, Text] = {}  # by example
        self._starts: dict[int, list[int]] = {}  # by round: the first rollout of every part
        self._features: dict[tuple[int, int], Any] = {}  # open files, by round and part
        self._processes, manifest = PartialState(), folder / "manifest.json"
        if self._processes.is_main_process and not manifest.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(manifest, json.dumps(origin, indent=1))
        self._processes.wait_for_everyone()
        if not manifest.exists():
            raise ConfigurationError("--online in several processes needs an --output-dir that all of them can read")
        found = json.loads(manifest.read_text())
        if other := [name for name in origin if found.get(name) != origin[name]]:
            raise MismatchError(
                f"the answers in '{folder}' were given with another {' and '.join(other)}: give another --output-dir"
            )

    def load(self, number: int, roll_out: Callable[[int], Sequence[Rollout]]) -> list[int]:
        """The examples of a round; where it is not in the folder, `roll_out` makes this process's part of it."""
        path = self._path(number, "json")
        (parts,) = broadcast_object_list([json.loads(path.read_text()) if path.exists() else None])
        if parts is None:  # for all processes
            parts = self._written(number, roll_out(number))
        self._starts[number] = [0, *accumulate(map(len, parts))][:-1]
        texts = [Text(*fields) for part in parts for fields in part]
        found = {number * self.size + j: text for j, text in enumerate(texts)}
        self.texts |= found
        return list(found)

    def forget(self, before: int) -> None:
        """Delete the features of all rounds before a round; their texts stay."""
        for key in [key for key in self._features if key[0] < before]:
            del self._features[key]
        files = self.folder.glob("round-*.safetensors") if self._processes.is_main_process else ()
        for path in files:
            if int(path.name.split(".")[0].removeprefix("round-")) < before:
                path.unlink()

    def batch(self, texts: Texts) -> Features:
        """See `FeatureSource.batch`."""
        return stacked([self._read(*divmod(i, self.size)) for i in texts.examples.tolist()], texts)

    def _read(self, number: int, place: int) -> Features:
        part = bisect_right(self._starts[number], place) - 1
        if (number, part) not in self._features:
            self._features[number, part] = safe_open(self._path(number, f"{part}.safetensors"), "pt")
        file, place = self._features[number, part], place - self._starts[number][part]
        return Features(*(file.get_tensor(f"{name}.{place}") for name in Features._fields))

    def _written(self, number: int, rollouts: Sequence[Rollout]) -> list[list[Any]]:
        """Write this process's part of a round; the texts of all parts."""
        part = self._processes.process_index
        features = {
            f"{name}.{j}": field.contiguous()
            for j, rollout in enumerate(rollouts)
            for name, field in zip(Features._fields, rollout.features)
        }
        features |= {} if features else {"empty": torch.zeros(1)}
        half = self._path(number, f"{part}.part")
        save_file(features, half)
        os.replace(half, self._path(number, f"{part}.safetensors"))
        parts: list[list[Any]] = gather_object([[rollout[:3] for rollout in rollouts]])  # waits for all features
        if self._processes.is_main_process:
            write_text(self._path(number, "json"), json.dumps(parts))
        return parts

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"round-{number:05d}.{kind}"
