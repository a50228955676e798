"""Target features from a server: asked for in every step, or kept on disk, a file a text.

Legend: B batch, T tokens, Q drafted tokens of a sequence, n layers, h hidden.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vsd.data import Example
from vsd.data.server import Reply
from vsd.errors import ConfigurationError, MismatchError
from vsd.features.base import Features, Texts, padded
from vsd.features.server import FeatureServer, States, read, taken
from vsd.files import write_text
from vsd.targets.info import TargetInfo

T = TypeVar("T")

_MANIFEST = "served.json"


class ServedFeatures:
    """A server computes features when they are asked for: `FeatureSource`.

    Args:
        server: checked already.
        layers: decoder layers, by input index, that the drafter reads.
        temperature: at which the target is served.
        concurrency: texts that are asked for at once.

    Raises:
        MismatchError: the server does not give these layers.
    """

    def __init__(
        self, server: FeatureServer, layers: Sequence[int], temperature: float = 1.0, concurrency: int = 32
    ) -> None:
        self.server, self.temperature = server, temperature
        self.columns = _columns(server.layers, layers, f"{server.url} gives")
        self._pool = ThreadPoolExecutor(concurrency)
        self._asked: dict[int, Future[States]] = {}  # by index of the example

    def expect(self, texts: Texts) -> None:
        """Ask for texts whose features will be needed soon."""
        for b, index in enumerate(texts.examples.tolist()):
            if index not in self._asked:
                self._asked[index] = self._pool.submit(self._ask, *_text(texts, b))

    def batch(self, texts: Texts) -> Features:
        """See `FeatureSource.batch`.

        Raises:
            VSDError: of `FeatureServer.text`.
        """
        self.expect(texts)
        found = self._all([self._asked[index] for index in texts.examples.tolist()])
        for index in set(texts.examples.tolist()):
            del self._asked[index]
        return _features(self.server.info, texts, found, self.columns, self.temperature)

    def continued(self, texts: Sequence[list[int]], count: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """`count` tokens behind each of N texts, sampled at the served temperature, and their states.

        Args:
            texts: tokens.
            seeds: of the N samples.

        Returns:
            tokens: [N, count].
            hidden: final hidden states that predict them, in the target's precision, [N, count, h].
            aux: features of each text's last token and of the new tokens but the last, as they are, [N, count, n h].

        Raises:
            VSDError: of `FeatureServer.continued`.
        """
        info, h = self.server.info, self.server.info.hidden_size
        found = self._all([self._pool.submit(self._continue, ids, count, seed) for ids, seed in zip(texts, seeds)])
        tokens, states = zip(*found)
        aux = torch.stack([one.aux for one in states]).unflatten(2, (-1, h))[:, :, self.columns]
        hidden = torch.stack([one.hidden for one in states]).to(info.device, info.dtype)
        return torch.tensor(tokens), info.norm(hidden), aux.flatten(2)

    def _continue(self, ids: list[int], count: int, seed: int) -> tuple[list[int], States]:
        tokens, path = self.server.continued(ids, count, self.temperature, seed)
        return tokens, taken(path)

    def _all(self, asked: Sequence[Future[T]]) -> list[T]:
        """The outcomes of requests, in their order; when one fails, those behind it are not waited for."""
        try:
            return [one.result() for one in asked]
        except BaseException:
            self.server.interrupt()
            raise

    def close(self) -> None:
        """Ask for nothing more."""
        self.server.interrupt()
        self._pool.shutdown(cancel_futures=True)
        self.server.close()

    def _ask(self, ids: list[int], drafted: list[int]) -> States:
        return taken(self.server.text(ids, drafted))


class TextStore:
    """States of texts in a folder, a file a text, named by the text: whatever is asked twice is kept once.

    Args:
        layers: of the server whose states are kept, to begin or continue a store; None to read one.

    Raises:
        MismatchError: the folder holds states of another target or other layers.
    """

    def __init__(self, folder: Path, info: TargetInfo, layers: Sequence[int] | None = None) -> None:
        self.folder, manifest = folder, folder / _MANIFEST
        wanted = {"target": info.fingerprint(), "layers": None if layers is None else list(layers)}
        if layers is not None and not manifest.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(manifest, json.dumps(wanted))
        found = json.loads(manifest.read_text())
        other = [what for what in wanted if wanted[what] not in (None, found[what])]
        if other:
            raise MismatchError(
                f"the features in '{folder}' are of {' and '.join(f'another {what}' for what in other)}: give another "
                "folder, or delete this one"
            )
        self.layers: list[int] = found["layers"]

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether there is such a store in a folder."""
        return (folder / _MANIFEST).exists()

    def path(self, ids: Sequence[int], drafted: Iterable[int]) -> Path:
        """Where the states of a text are; they depend on all tokens but the last."""
        name = hashlib.sha256(json.dumps([list(ids[:-1]), list(drafted)]).encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def add(self, file: Path, ids: Sequence[int], drafted: Iterable[int]) -> None:
        """Move a file of states into the store; it is there whole, or not at all."""
        path = self.path(ids, drafted)
        path.parent.mkdir(exist_ok=True)
        half = path.with_suffix(f".{file.stem}")
        shutil.move(file, half)
        os.replace(half, path)

    def missing(self, examples: Iterable[Example]) -> list[Example]:
        """The examples whose states are not there."""
        return [one for one in examples if not self.path(one.inputs.ids, positions(one)).exists()]

    def fill(self, text: Callable[[list[int], list[int]], Path], examples: Iterable[Example], concurrency: int) -> None:
        """Ask for the states that are missing.

        Args:
            text: `FeatureServer.text`.

        Raises:
            VSDError: of `text`.
        """
        with ThreadPoolExecutor(concurrency) as pool:
            for _ in pool.map(lambda one: self._fill_one(text, one), self.missing(examples)):
                pass

    def _fill_one(self, text: Callable[[list[int], list[int]], Path], example: Example) -> None:
        ids, drafted = example.inputs.ids, positions(example)
        self.add(text(ids, drafted), ids, drafted)


class KeptFeatures:
    """The features of a list of examples in a `TextStore`: `FeatureSource`.

    Args:
        layers: decoder layers, by input index, that the drafter reads.
        temperature: at which the target is served.

    Raises:
        MismatchError: the store does not have these layers, or not all examples.
    """

    def __init__(
        self,
        store: TextStore,
        info: TargetInfo,
        examples: Sequence[Example],
        layers: Sequence[int],
        temperature: float = 1.0,
    ) -> None:
        self.store, self.info, self.temperature = store, info, temperature
        self.columns = _columns(store.layers, layers, f"'{store.folder}' holds")
        if missing := store.missing(examples):
            raise MismatchError(
                f"'{store.folder}' lacks the features of {len(missing)} of {len(examples)} texts: run "
                "`vsd data regenerate` with --server and --features again, which adds them"
            )

    def batch(self, texts: Texts) -> Features:
        """See `FeatureSource.batch`."""
        found = [read(self.store.path(*_text(texts, b))) for b in range(len(texts.examples))]
        return _features(self.info, texts, found, self.columns, self.temperature)


class KeepingServer(FeatureServer):
    """A server whose answers' states are kept in a folder before the answer is returned."""

    def __init__(
        self,
        url: str,
        model: str,
        requests_per_second: float | None,
        info: TargetInfo,
        folder: Path,
        temperature: float = 0.0,
    ) -> None:
        super().__init__(url, model, requests_per_second, info, temperature)
        self.folder = folder

    def check(self) -> None:
        """See `FeatureServer.check`; and open the store, which may hold the states of other servers of this target."""
        super().check()
        try:
            self.store = TextStore(self.folder, self.info, self.layers)
        except MismatchError as error:
            raise MismatchError(f"{self.url} gives layers {list(self.layers)}; {error}") from None

    def ask(self, messages: list[dict[str, str]], ids: list[int], **sampling: Any) -> Reply:
        """See `Server.ask`.

        Raises:
            ConfigurationError: messages with images, whose states a store does not tell apart.
        """
        if any(not isinstance(message["content"], str) for message in messages):
            raise ConfigurationError("a server gives no features of images: leave out --features")
        reply, file = self.answer(messages, ids, **sampling)
        prompt, answer = reply.prompt_ids or ids, reply.ids or []
        if len(answer) > 1:
            self.store.add(file, [*prompt, *answer], range(len(prompt) + 1, len(prompt) + len(answer)))
        else:
            file.unlink()  # nothing is drafted
        return reply


def positions(example: Example) -> list[int]:
    """Positions of the drafted tokens."""
    return [position for position, drafted in enumerate(example.drafted) if drafted]


def _text(texts: Texts, b: int) -> tuple[list[int], list[int]]:
    """Tokens and drafted positions of one text of a batch."""
    if texts.inputs.extras:
        raise ConfigurationError("a server gives no features of images: give --features online")
    ids = texts.inputs.ids[b, : int(texts.inputs.lengths[b])].tolist()
    return ids, texts.drafted[b][texts.real[b]].tolist()


def _columns(given: Sequence[int], layers: Sequence[int], source: str) -> list[int]:
    """Where the wanted layers are among those given."""
    if not set(layers) <= set(given):
        raise MismatchError(
            f"{source} features of layers {list(given)}, and the drafter reads {list(layers)}: start the server with "
            "the command that `vsd data server` prints for this family of drafters"
        )
    return [list(given).index(layer) for layer in layers]


@torch.no_grad()
def _features(
    info: TargetInfo, texts: Texts, found: Sequence[States], columns: list[int], temperature: float
) -> Features:
    """The features of a batch; those of each text's last token, which no drafter reads, are zero."""
    device, (B, T), Q = texts.drafted.device, texts.inputs.ids.shape, texts.drafted.shape[1]
    h = info.hidden_size
    aux = padded([one.aux.unflatten(1, (-1, h))[:, columns] for one in found], T, device)  # [B, T, n, h]
    hidden = info.norm(padded([one.hidden for one in found], Q, device).to(info.dtype))  # [B, Q, h]
    normaliser = info.log_normaliser(hidden.flatten(0, 1), temperature)
    return Features(aux.flatten(2).float(), hidden.float(), normaliser.view(B, Q).float())
