"""Gradient accumulation and DDP with every kind of E-step.

What is drawn for a text depends on seed, step and text, so the division of a step into batches and processes changes
nothing, neither from the start nor when a run is resumed. The gradient of an accumulated step is the sum over its
batches, the gradient of several processes is the mean over theirs, and all replicas stay equal.
"""

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
import tiny_run
import warm
from vsd import cli
from vsd.data import Example
from vsd.targets import Inputs, Target
from vsd.training import VSDTrainer
from vsd.training.job import end_processes

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "recorded": ("eagle3", {}),
    "continued": ("vsd", {"anchors": 3, "length": 4}),
    "drafted": ("vsd", {"rule": "rejection", "e_step": "drafted", "samples": 3, "every": 1, "weight": 1.0}),
    "trees": ("vsd", {"rule": "target", "e_step": "trees", "tree": "3x3x9", "every": 1, "weight": 1.0}),
    "distillspec": ("distillspec", {"samples": 3}),
    "gto": ("gto", {"tree": "3x3x9", "anchors": 3, "rule": "target"}),
    "cut": ("vsd", {"e_step": None, "smoothing": 0.3}),
}
DRAWN = [kind for kind in KINDS if kind != "recorded"]
LEARNING_RATE = 1e-2
ONE_STEP = {"optim": "sgd", "max_steps": 1, "warmup_steps": 0, "learning_rate": LEARNING_RATE, "max_grad_norm": 1e9}
Weights = dict[str, Tensor]


def trainer_of(kind: str, target: Target, examples: list[Example], folder: Path, **options: Any) -> VSDTrainer:
    """A trainer whose drafter has moved since the start (`gto` compares both), the same in every process."""
    objective, objective_options = KINDS[kind]
    trainer = tiny_run.tiny_trainer(
        target, examples, folder, objective=objective, objective_options=objective_options, **options
    )
    generator = torch.Generator().manual_seed(1)
    for weight in drafter_of(trainer).parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return trainer


def drafter_of(trainer: VSDTrainer) -> nn.Module:
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert isinstance(model, nn.Module)
    return model


def weights_of(trainer: VSDTrainer) -> Weights:
    return {name: weight.detach().clone() for name, weight in drafter_of(trainer).named_parameters()}


def gradients(trainer: VSDTrainer, items: int) -> list[Weights]:
    """Gradient of every batch of this process in the first step; `items`: supervised tokens of the whole step."""
    found = []
    drafter = drafter_of(trainer)
    for inputs in trainer.get_train_dataloader():
        drafter.zero_grad()
        trainer.compute_loss(drafter, inputs, num_items_in_batch=torch.tensor(items)).backward()
        found.append(
            {name: weight.grad.clone() for name, weight in drafter.named_parameters() if weight.grad is not None}
        )
    return found


def uneven(examples: list[Example]) -> list[Example]:
    """Answers of very different lengths: a mean of means would not be the mean."""
    return [
        Example(Inputs(inputs.ids[:end]), drafted[:end])
        for i, (inputs, drafted, _) in enumerate(examples)
        for end in [drafted.index(True) + 1 + 3 * i]
    ]


def supervised(examples: list[Example]) -> int:
    return sum(sum(example.drafted) for example in examples)


@pytest.fixture(scope="module")
def examples(tiny_target: Target) -> list[Example]:
    return uneven(tiny_run.tiny_examples(tiny_target, 8))


def assert_moved_by(found: Weights, start: Weights, gradient: Weights) -> None:
    """`found` is one step of SGD from `start`."""
    for name, weight in start.items():
        assert gradient[name].abs().max() > 0, name
        torch.testing.assert_close(found[name], weight - LEARNING_RATE * gradient[name], rtol=1e-5, atol=1e-5, msg=name)


def added(gradients: list[Weights]) -> Weights:
    return {name: torch.stack([gradient[name] for gradient in gradients]).sum(0) for name in gradients[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_an_accumulated_step_is_the_sum_of_its_batches(
    tiny_target: Target, examples: list[Example], tmp_path: Path, kind: str
) -> None:
    cut = {**ONE_STEP, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = trainer_of(kind, tiny_target, examples, tmp_path, **cut)
    start = weights_of(trainer)
    trainer.train()
    each = gradients(trainer_of(kind, tiny_target, examples, tmp_path, **cut), supervised(examples))
    assert len(each) == 4
    assert_moved_by(weights_of(trainer), start, added(each))


@pytest.mark.parametrize("kind", DRAWN)
def test_batches_of_a_step_draw_different_paths(
    tiny_target: Target, examples: list[Example], tmp_path: Path, kind: str
) -> None:
    """Two batches of the same text have different gradients."""
    twins = [examples[-1]] * 2
    options = {**ONE_STEP, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    first, second = gradients(trainer_of(kind, tiny_target, twins, tmp_path, **options), supervised(twins))
    assert any(not torch.allclose(first[name], second[name], rtol=1e-3) for name in first)


def counted(right: int, first: int) -> Any:
    """The counts of a batch: first drafted tokens, and the right ones among them."""
    return SimpleNamespace(correct=torch.tensor([right, 0.0, 0.0]), rows=torch.tensor([first, 0.0, 0.0]))


def test_the_running_acceptance_moves_by_whole_steps(
    tiny_target: Target, examples: list[Example], tmp_path: Path
) -> None:
    """The weights of a step must not depend on how many batches it has."""
    trainer = trainer_of("recorded", tiny_target, examples, tmp_path, **ONE_STEP)
    whole_step = trainer.accelerator.gradient_state._set_sync_gradients
    for right, seen in ((1, None), (3, 0.5), (0, 0.5), (8, 0.99 * 0.5 + 0.01 * 8 / 8)):
        whole_step(right in (3, 8))
        trainer._remember(counted(right, 4))
        assert trainer._acceptance == pytest.approx(seen)


# ---- two processes

TWO = {"ddp_backend": "gloo", "per_device_train_batch_size": 4}


def work(rank: int, port: int, out: Path) -> None:
    """One of two processes, as `torchrun` starts them: `KIND-RANK.pt` for every kind of E-step."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
    target = tiny.tiny_target()
    examples = uneven(tiny_run.tiny_examples(target, 8))
    for kind in KINDS:
        torch.save(seen(kind, rank, target, examples, out), out / f"{kind}-{rank}.pt")
    trainer = trainer_of("recorded", target, examples, out, **TWO, **ONE_STEP)
    trainer._remember(counted(1 + 2 * rank, 4))
    assert trainer._acceptance == 0.5  # of both processes: 4 of 8
    for kind in RESUMED:
        several_steps(kind, target, out / f"two-{kind}", **HALVES)
        weights = several_steps(kind, target, out / f"from-one-{kind}", out / f"one-{kind}" / "checkpoint-2", **HALVES)
        torch.save(weights, out / f"from-one-{kind}-{rank}.pt")
    end_processes()
    threads = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads  # one alive at exit aborts the process, now and then


def seen(kind: str, rank: int, target: Target, examples: list[Example], out: Path) -> dict[str, Any]:
    """Weights, gradients and losses of this process in a step, on two equal texts, and in three steps."""
    trainer = trainer_of(kind, target, examples, out, **TWO, **ONE_STEP)
    assert (trainer.accelerator.num_processes, trainer.accelerator.process_index) == (2, rank)
    found: dict[str, Any] = {"start": weights_of(trainer)}
    trainer.train()
    found["one step"] = weights_of(trainer)
    again = trainer_of(kind, target, examples, out, **TWO, **ONE_STEP)
    (found["gradient"],) = gradients(again, supervised(examples))
    twins = [examples[-1]] * 2
    alone = trainer_of(kind, target, twins, out, **{**TWO, **ONE_STEP, "per_device_train_batch_size": 1})
    (found["gradient of twins"],) = gradients(alone, supervised(twins))
    steps = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "gradient_accumulation_steps": 2}
    measured = {"eval_strategy": "steps", "eval_steps": 1, "eval_max_new_tokens": 4}
    asked = [Inputs(examples[0].inputs.ids[:8])]
    trainer = trainer_of(
        kind,
        target,
        examples,
        out,
        eval_prompts=asked,
        **{**TWO, **steps, **measured, "per_device_train_batch_size": 2},
    )
    trainer.train()
    found["three steps"] = weights_of(trainer)
    found["acceptance"] = trainer._acceptance
    found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return found


# ---- resumed with another number of processes

RESUMED = ["continued", "drafted", "gto"]
WHOLE = {"per_device_train_batch_size": 4}
HALVES = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "warmup_steps": 0, "learning_rate": 1e-2}


def several_steps(kind: str, target: Target, folder: Path, checkpoint: Path | None = None, **division: Any) -> Weights:
    """Weights after four steps of four texts each, three of them an epoch of ten texts; `checkpoint-2` is in it.

    Adam's ε is above rounding errors, which it would blow up to whole steps.
    """
    examples = uneven(tiny_run.tiny_examples(target, 10))
    trainer = trainer_of(kind, target, examples, folder, adam_epsilon=1e-2, **SAVED, **division)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return weights_of(trainer)


@pytest.fixture(scope="module")
def two_processes(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `KIND-RANK.pt` for every kind of E-step and both processes, and the runs of `several_steps`."""
    folder = tmp_path_factory.mktemp("two")
    for kind in RESUMED:
        torch.save(several_steps(kind, tiny_target, folder / f"one-{kind}", **WHOLE), folder / f"one-{kind}.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [warm.start(work, rank, port, folder, log=folder / f"{rank}.log") for rank in (0, 1)]
    for rank, process in enumerate(started):
        process.join(600)
        assert process.exitcode == 0, (folder / f"{rank}.log").read_text()[-3000:]
    return folder


def ranks(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (torch.load(folder / f"{kind}-{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_two_processes_is_the_mean_of_their_gradients(two_processes: Path, kind: str) -> None:
    first, second = ranks(two_processes, kind)
    mean = {name: (first["gradient"][name] + second["gradient"][name]) / 2 for name in first["start"]}
    assert_moved_by(first["one step"], first["start"], mean)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_stay_equal(two_processes: Path, kind: str) -> None:
    """Three steps of accumulated batches with a measurement behind each: the same weights to the last bit."""
    first, second = ranks(two_processes, kind)
    for name, weight in first["three steps"].items():
        assert torch.equal(weight, second["three steps"][name]), name
        assert bool(weight.isfinite().all()) and not torch.equal(weight, first["start"][name]), name
    assert len(first["losses"]) == 3 and all(torch.tensor(first["losses"]).isfinite())


def test_processes_share_the_running_acceptance(
    tiny_target: Target, examples: list[Example], tmp_path: Path, two_processes: Path
) -> None:
    """ARW's smoothing depends on it: of two processes it is that of one which reads the same texts."""
    first, second = ranks(two_processes, "recorded")
    steps = {"max_steps": 3, "learning_rate": 1e-2, "gradient_accumulation_steps": 4}
    whole = trainer_of("recorded", tiny_target, examples, tmp_path, **steps, per_device_train_batch_size=2)
    whole.train()
    assert first["acceptance"] == second["acceptance"] is not None
    assert first["acceptance"] == pytest.approx(whole._acceptance, abs=1e-6)


@pytest.mark.parametrize("kind", DRAWN)
def test_processes_draw_different_paths(two_processes: Path, kind: str) -> None:
    """On the same text they have different gradients."""
    first, second = (found["gradient of twins"] for found in ranks(two_processes, kind))
    assert any(not torch.allclose(first[name], second[name], rtol=1e-3) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_the_division_of_a_step_changes_nothing(
    tiny_target: Target, examples: list[Example], tmp_path: Path, two_processes: Path, kind: str
) -> None:
    """One batch of 8, four batches of 2, two processes of 4: the same step, of texts of very different lengths."""
    whole = {"per_device_train_batch_size": 8}
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    found = []
    for division in (whole, cut):
        trainer = trainer_of(kind, tiny_target, examples, tmp_path, **ONE_STEP, **division)
        trainer.train()
        found.append(weights_of(trainer))
    found.append(ranks(two_processes, kind)[0]["one step"])
    for other in found[1:]:
        for name, weight in found[0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_resumes_with_another_number_of_processes(
    tiny_target: Target, tmp_path: Path, two_processes: Path, kind: str
) -> None:
    """From one process to two and from two to one: the drafter of an uninterrupted run."""
    straight = torch.load(two_processes / f"one-{kind}.pt", weights_only=True)
    half_way = two_processes / f"two-{kind}" / "checkpoint-2"
    found = [several_steps(kind, tiny_target, tmp_path, half_way, **WHOLE)]
    found += [torch.load(two_processes / f"from-one-{kind}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for one in found:
        torch.testing.assert_close(one, straight, rtol=1e-4, atol=1e-5)


# ---- the command


def test_torchrun_trains_what_one_process_does(tiny_target: Target, tmp_path: Path) -> None:
    """The documented command, with features that both processes store and τ measured: the drafter of one process."""
    target, text = tmp_path / "target", tmp_path / "text.jsonl"
    tiny_run.write_target(tiny_target, target)
    tiny_run.write_text(tiny_target, text, 10)
    words = ["train", "--target", target, "--data", text, "--held-out", 2, "--features", "store", "--max-steps", 4]
    words += ["--objective", "eagle3", "--draft-vocab-size", 64, "--device", "cpu", "--dtype", "float32"]
    words += ["--set", "warmup_steps=0", "report_to=none", "bf16=false", "adam_epsilon=1e-2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*map(str, words), "per_device_train_batch_size=4", "--output-dir", str(one)]) == 0
    printed = tiny_run.torchrun([*words, "per_device_train_batch_size=2", "--output-dir", two])
    for name in ("drafter", "best"):
        wanted, found = (load_file(folder / name / "model.safetensors") for folder in (one, two))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert printed.count("GB, stored in") == 1
