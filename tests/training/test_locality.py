"""Locality: blocks of an untrained drafter attend near their root at first, and as they are decoded in the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_run
from vsd.data import Example
from vsd.drafters import load_drafter
from vsd.drafters.load import start_drafter
from vsd.targets import Padded, Target
from vsd.training import DraftDataset, VSDConfig, VSDTrainer


@pytest.fixture(scope="module")
def examples(tiny_target: Target) -> list[Example]:
    return tiny_run.tiny_examples(tiny_target, 8)


def localities(target: Target, drafter: Any, examples: list[Example], folder: Path, **options: Any) -> list[float]:
    """Of every step of a run of eight."""
    choice: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "bf16": False, "max_steps": 8, **options}
    checkpoint, blocks, found = choice.pop("checkpoint", None), drafter.blocks, []
    config = VSDConfig(output_dir=str(folder), draft_steps=3, **choice)
    trainer = VSDTrainer(target, drafter, config, DraftDataset(examples))
    drafter.blocks = lambda *args: found.append(drafter.locality_slope) or blocks(*args)
    trainer.train(resume_from_checkpoint=checkpoint)
    drafter.blocks = blocks
    return found


@pytest.mark.parametrize("family", ["peagle", "dflash", "dspark"])
def test_it_falls_evenly_to_zero(tiny_target: Target, examples: list[Example], tmp_path: Path, family: str) -> None:
    def new() -> Any:
        return tiny_run.tiny_drafter(tiny_target, examples, family=family)

    assert localities(tiny_target, new(), examples, tmp_path) == [2.0, 1.5, 1.0, 0.5, 0, 0, 0, 0]
    assert localities(tiny_target, new(), examples, tmp_path, locality=0.25) == [2.0, 1.0, 0, 0, 0, 0, 0, 0]
    assert localities(tiny_target, new(), examples, tmp_path, locality=0.0) == [0.0] * 8


def test_a_drafter_is_trained_once_from_near_its_roots(
    tiny_target: Target, examples: list[Example], tmp_path: Path
) -> None:
    drafter = tiny_run.tiny_drafter(tiny_target, examples, family="dflash")
    assert localities(tiny_target, drafter, examples, tmp_path)[0] == 2.0
    assert localities(tiny_target, drafter, examples, tmp_path) == [0.0] * 8


def test_trained_blocks_go_on_as_they_are_decoded(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    tiny_run.tiny_drafter(tiny_target, examples, family="dflash").save_pretrained(tmp_path / "dflash")
    read = load_drafter(tmp_path / "dflash", tiny_target, trainable=True)
    assert localities(tiny_target, read, examples, tmp_path / "a") == [0.0] * 8
    corrected = start_drafter(read, tiny_target, "dflash2")
    assert localities(tiny_target, corrected, examples, tmp_path / "b") == [0.0] * 8


def test_a_resumed_run_never_raises_it(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    """A run that is given more time is earlier in its time than it was; a run of former versions had no locality."""

    def run(**options: Any) -> list[float]:
        drafter = tiny_run.tiny_drafter(tiny_target, examples, family="dflash")
        return localities(tiny_target, drafter, examples, tmp_path, locality=1.0, **options)

    straight = run(save_strategy="steps", save_steps=4)
    assert straight == [2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]
    checkpoint = tmp_path / "checkpoint-4"
    assert run(checkpoint=str(checkpoint)) == straight[4:]
    assert run(checkpoint=str(checkpoint), max_steps=16)[:6] == [1.25, 1.25, 1.25, 1.125, 1.0, 0.875]
    memory = json.loads((checkpoint / "memory_0.json").read_text())
    (checkpoint / "memory_0.json").write_text(json.dumps({k: v for k, v in memory.items() if k != "slope"}))
    assert run(checkpoint=str(checkpoint)) == [0.0] * 4


def test_trees_are_grown_as_in_decoding(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    drafter = tiny_run.tiny_drafter(tiny_target, examples, family="dflash")
    gto: dict[str, Any] = {"objective": "gto", "objective_options": {"tree": "3x2x6", "anchors": 4}}
    assert set(localities(tiny_target, drafter, examples, tmp_path, **gto)) == {0.0}


def test_patience_counts_from_its_end(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    """At a rate of zero τ never rises, so that patience ends the run as soon as it counts."""
    options: dict[str, Any] = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1, "patience": 1}
    prompts = [tiny_run.prompt_of(example) for example in examples[:2]]
    trainer = tiny_run.tiny_trainer(
        tiny_target, examples, tmp_path, family="dflash", eval_prompts=prompts, max_steps=8, **options
    )
    trainer.train()
    assert trainer.state.global_step == 5  # the fifth step is the first one without locality


def test_mask_nodes_start_with_the_mean_features(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    trained = tiny_run.tiny_drafter(tiny_target, examples, family="eagle3")
    started = start_drafter(trained, tiny_target, "peagle", num_hidden_layers=2)
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path)
    before = started.mask_hidden.clone()
    VSDTrainer(tiny_target, started, trainer.args, DraftDataset(examples))
    layers = started.needs.layers
    rows = [tiny_target.features(Padded.of([example.inputs]), layers).aux[0, :-1] for example in examples]
    assert not torch.allclose(before, started.mask_hidden)
    torch.testing.assert_close(started.mask_hidden[0], torch.cat(rows).mean(0), rtol=1e-4, atol=1e-5)
    torch.nn.init.zeros_(started.mask_hidden)
    started.save_pretrained(tmp_path / "saved")
    read = load_drafter(tmp_path / "saved", tiny_target, trainable=True)
    VSDTrainer(tiny_target, read, trainer.args, DraftDataset(examples))
    assert not read.mask_hidden.any()
