"""Rounds of rollouts in a folder, and their features.

Round n is round-n.json, its texts, and round-n.safetensors, its features, which are written first: a round whose texts
are there is whole. A resumed run reads the rounds that the interrupted one wrote.

Legend: R most rollouts of a round; example n R + j is rollout j of round n.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vsd.data import Example, drafted_mask
from vsd.errors import MismatchError
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
        MismatchError: the folder holds rounds of another origin.
    """

    def __init__(self, folder: Path, size: int, origin: Mapping[str, str]) -> None:
        self.folder, self.size = folder, size
        self.texts: dict[int, Text] = {}  # by example
        self._features: dict[int, Any] = {}  # open files, by round
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / "manifest.json"
        if not manifest.exists():
            write_text(manifest, json.dumps(origin, indent=1))
        found = json.loads(manifest.read_text())
        if other := [name for name in origin if found.get(name) != origin[name]]:
            raise MismatchError(
                f"the answers in '{folder}' were given with another {' and '.join(other)}: "
                "give another --output-dir, or delete this folder"
            )

    def load(self, number: int, roll_out: Callable[[int], Sequence[Rollout]]) -> list[int]:
        """The examples of a round; where it is not in the folder `roll_out` makes it, and it is written."""
        if not self._path(number, "json").exists():
            self._write(number, roll_out(number))
        texts = [Text(*fields) for fields in json.loads(self._path(number, "json").read_text())]
        found = {number * self.size + j: text for j, text in enumerate(texts)}
        self.texts |= found
        return list(found)

    def forget(self, before: int) -> None:
        """Delete the features of all rounds before a round; their texts stay."""
        for path in self.folder.glob("round-*.safetensors"):
            number = int(path.stem.removeprefix("round-"))
            if number < before:
                self._features.pop(number, None)
                path.unlink()

    def batch(self, texts: Texts) -> Features:
        """See `FeatureSource.batch`."""
        return stacked([self._read(*divmod(i, self.size)) for i in texts.examples.tolist()], texts)

    def _read(self, number: int, place: int) -> Features:
        if number not in self._features:
            self._features[number] = safe_open(self._path(number, "safetensors"), "pt")
        return Features(*(self._features[number].get_tensor(f"{name}.{place}") for name in Features._fields))

    def _write(self, number: int, rollouts: Sequence[Rollout]) -> None:
        features = {
            f"{name}.{j}": field.contiguous()
            for j, rollout in enumerate(rollouts)
            for name, field in zip(Features._fields, rollout.features)
        }
        features |= {} if features else {"empty": torch.zeros(1)}
        half = self._path(number, "part")
        save_file(features, half)
        os.replace(half, self._path(number, "safetensors"))
        write_text(self._path(number, "json"), json.dumps([rollout[:3] for rollout in rollouts]))

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"round-{number:05d}.{kind}"
