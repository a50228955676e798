"""Block drafters in the trainer: every objective trains them, runs resume, and acceptance rises in the real decoder."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_run
from vsd.data import Example
from vsd.targets import Target

FAMILIES = ["peagle", "dflash", "dflash2", "dspark"]


@pytest.fixture(scope="module")
def examples(tiny_target: Target) -> list[Example]:
    return tiny_run.tiny_examples(tiny_target, 8)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eagle3", {}),
        ("lk_lambda", {}),
        ("dpace", {}),
        ("griffin", {}),
        ("vispec", {}),
        ("elbo", {"samples": 4}),
        ("vsd", {}),
        ("vsd", {"rule": "rejection", "arw": True, "e_step": "drafted", "samples": 4}),
        ("vsd", {"rule": "target", "e_step": "trees", "tree": "3x2x6"}),
        ("gto", {"tree": "3x2x6", "anchors": 4}),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_objective_trains_them(
    tiny_target: Target, examples: list[Example], tmp_path: Path, family: str, name: str, options: dict[str, Any]
) -> None:
    choice = {"objective": name, "objective_options": options, "max_steps": 2, "learning_rate": 1e-2}
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, family=family, warmup_steps=0, **choice)
    start = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert all(bool(weight.isfinite().all()) for weight in trainer.model.parameters())
    still = [name for name, weight in trainer.model.named_parameters() if torch.equal(weight, start[name])]
    assert not still


@pytest.mark.parametrize("family", [*FAMILIES, "lm"])
def test_a_resumed_run_ends_with_the_same_drafter(
    tiny_target: Target, examples: list[Example], tmp_path: Path, family: str
) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}

    def trained(folder: Path) -> Any:
        return tiny_run.tiny_trainer(tiny_target, examples, folder, family=family, max_steps=4, **options)

    straight = trained(tmp_path / "straight")
    straight.train()
    resumed = trained(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    wanted = straight.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_raises_acceptance_in_the_real_decoder(tiny_target: Target, tmp_path: Path, family: str) -> None:
    """On the prompts of the training text: whether training and decoding agree, not how well it generalises."""
    text = tiny_run.tiny_examples(tiny_target, 16, 24)
    options = {"learning_rate": 1e-2, "num_train_epochs": 40, "eval_max_new_tokens": 20}
    prompts = [tiny_run.prompt_of(example) for example in text]
    trainer = tiny_run.tiny_trainer(tiny_target, text, tmp_path, family=family, eval_prompts=prompts, **options)
    before = trainer.evaluate()["eval_tau"]
    trainer.train()
    after = trainer.evaluate()["eval_tau"]
    assert after > before + 0.8
    assert trainer.model.config.draft_steps == 3
