"""Features and the E-step's paths from one pass of the target over the texts, against a pass for each."""

import gc
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import seeing
import tiny
import tiny_run
from vsd.data import Example
from vsd.features import Features, InProcess, Texts
from vsd.targets import Target, TreeCache
from vsd.targets.cache import Slots
from vsd.training import VSDTrainer
from vsd.training.e_step import Batch, Posterior

DRAWN: dict[str, tuple[str, dict[str, Any]]] = {
    "continued": ("vsd", {"anchors": 3, "length": 4, "epochs": 2}),
    "drafted": ("vsd", {"rule": "rejection", "e_step": "drafted", "samples": 3, "every": 1, "weight": 1.0}),
    "trees": ("vsd", {"rule": "target", "e_step": "trees", "tree": "3x3x9", "every": 1, "weight": 1.0}),
    "gto": ("gto", {"tree": "3x3x9", "anchors": 3, "rule": "target"}),
}
OTHERS = {
    "recorded": ("eagle3", {}),
    "greedy gto": ("gto", {"tree": "3x3x9", "anchors": 3}),
}
STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0}


class Apart:
    """Features of a pass that leaves no cache, as of a store."""

    def __init__(self, source: InProcess) -> None:
        self.source = source

    def batch(self, texts: Texts) -> Features:
        return self.source.batch(texts)


class Seen(NamedTuple):
    """Tokens of every batch; those that all passes from the first token on read, and those read into a cache."""

    tokens: list[int]
    read: int
    cached: int
    features: list[Features]
    paths: list[list[Posterior]]
    weights: dict[str, Tensor]


def texts_with_pictures(family: str) -> tuple[Target, list[Example]]:
    """Texts with and without pictures, of different lengths."""
    target = seeing.target(family)
    examples = []
    for n in range(8):
        pictures = [seeing.picture(n)] * (n % 3)
        inputs = seeing.read(target, "#" * len(pictures) + f"what {n}", *pictures)
        answer = [20 + (3 * n + i) % 60 for i in range(8 + n)]
        drafted = [False] * (len(inputs.ids) + 1) + [True] * (len(answer) - 1)
        examples.append(Example(inputs.followed_by(answer), drafted))
    return target, examples


@pytest.fixture(scope="module", params=["text", "llava", "qwen2_5_vl"])
def written(request: pytest.FixtureRequest) -> tuple[Target, list[Example]]:
    if request.param != "text":
        return texts_with_pictures(request.param)
    target = tiny.tiny_target()
    return target, tiny_run.tiny_examples(target, 8)


def trained(written: tuple[Target, list[Example]], folder: Path, kind: tuple[str, dict[str, Any]], apart: bool) -> Seen:
    """Two epochs of two steps."""
    target, examples = written
    choice = {"objective": kind[0], "objective_options": kind[1], **STEPS}
    trainer = tiny_run.tiny_trainer(target, examples, folder, **choice)
    if apart:
        trainer.features = Apart(trainer.features)  # type: ignore[arg-type]
    counts, tokens, features, paths = [0, 0], [], [], []
    e_step = trainer._e_step

    def count(module: object, arguments: object, inputs: dict[str, Any]) -> None:
        cache = next((value for value in inputs.values() if isinstance(value, TreeCache)), None)
        if cache is None or cache.slots.fill == 0:
            counts[0] += inputs["input_ids"].numel()
            counts[1] += 0 if cache is None else inputs["input_ids"].numel()

    def listen(batch: Batch) -> list[Posterior]:
        tokens.append(batch.texts.inputs.ids.numel())
        features.append(batch.features)
        paths.append(e_step(batch))
        return paths[-1]

    trainer._e_step = listen  # type: ignore[method-assign]
    hook = target.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    hook.remove()
    weights = {name: weight.detach() for name, weight in trainer.model.named_parameters()}
    return Seen(tokens, counts[0], counts[1], features, paths, weights)


@pytest.mark.parametrize("kind", DRAWN)
def test_one_pass_gives_what_two_give(written: tuple[Target, list[Example]], tmp_path: Path, kind: str) -> None:
    """A pass of every text is spared; features, paths and the trained drafter are the same."""
    shared, apart = (trained(written, tmp_path, DRAWN[kind], apart) for apart in (False, True))
    drawn = sum(shared.tokens[:2] if kind == "continued" else shared.tokens)  # the second epoch keeps the first one's
    assert (shared.read, shared.cached) == (sum(shared.tokens), drawn)
    assert (apart.read, apart.cached) == (sum(shared.tokens) + drawn, drawn)
    for found, wanted in zip(shared.features, apart.features, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(shared.paths, apart.paths, strict=True):
        for mine, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine.paths, other.paths)
            torch.testing.assert_close(mine.target.hidden, other.target.hidden, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shared.weights, apart.weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", OTHERS)
def test_no_cache_is_filled_in_vain(tmp_path: Path, kind: str) -> None:
    target = tiny.tiny_target()
    seen = trained((target, tiny_run.tiny_examples(target, 8)), tmp_path, OTHERS[kind], apart=False)
    assert (seen.read, seen.cached) == (sum(seen.tokens), 0)


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("apart", [False, True])
def test_the_m_step_runs_without_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, apart: bool
) -> None:
    """Its memory is free, although the garbage collector has not run; and nodes have found room in it."""
    target = tiny.tiny_target()
    objective, options = DRAWN[kind]
    choice = {"objective": objective, "objective_options": options, **STEPS, "max_steps": 1}
    trainer = tiny_run.tiny_trainer(target, tiny_run.tiny_examples(target, 8), tmp_path, **choice)
    if apart:
        trainer.features = Apart(trainer.features)  # type: ignore[arg-type]
    alive, m_steps, m_step = [], [], VSDTrainer._m_step
    store_for = Slots.store_for

    def watched(slots: Slots, *states: Tensor) -> Any:
        store = store_for(slots, *states)
        alive.append(weakref.ref(store))
        return store

    def checked(trainer: VSDTrainer, *inputs: Any) -> Any:
        m_steps.append([one() for one in alive])
        return m_step(trainer, *inputs)

    monkeypatch.setattr(Slots, "store_for", watched)
    monkeypatch.setattr(Slots, "reserve", lambda slots, count: slots.capacity >= count or pytest.fail("it grew"))
    monkeypatch.setattr(VSDTrainer, "_m_step", checked)
    gc.disable()
    try:
        trainer.train()
    finally:
        gc.enable()
    assert m_steps and m_steps[0] and not any(m_steps[0])
