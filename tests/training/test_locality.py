"""Locality: blocks of an untrained drafter attend near their root at first, and as they are decoded in the end."""

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
    config = VSDConfig(output_dir=str(folder), draft_steps=3, **choice)
    trainer, found = VSDTrainer(target, drafter, config, DraftDataset(examples)), []
    if drafter.one_pass:
        blocks = drafter.blocks
        drafter.blocks = lambda *args: found.append(drafter.locality) or blocks(*args)
    trainer.train()
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


def test_mask_nodes_start_with_the_mean_features(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    trained = tiny_run.tiny_drafter(tiny_target, examples, family="eagle3")
    started = start_drafter(trained, tiny_target, "peagle", num_hidden_layers=2)
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path)
    before = started.mask_hidden.clone()
    VSDTrainer(tiny_target, started, trainer.args, DraftDataset(examples))
    layers = started.needs.layers
    rows = [tiny_target.features(Padded.of([example.inputs]), layers).aux[0] for example in examples]
    assert not torch.allclose(before, started.mask_hidden)
    torch.testing.assert_close(started.mask_hidden[0], torch.cat(rows).mean(0), rtol=1e-4, atol=1e-5)
    torch.nn.init.zeros_(started.mask_hidden)
    started.save_pretrained(tmp_path / "saved")
    read = load_drafter(tmp_path / "saved", tiny_target, trainable=True)
    VSDTrainer(tiny_target, read, trainer.args, DraftDataset(examples))
    assert not read.mask_hidden.any()
