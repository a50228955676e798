"""Where alternative continuations begin, and how long they are kept."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import along
import tiny_run
from vsd.data import Example
from vsd.targets import Inputs, Target
from vsd.training.e_step import Batch, kept
from vsd.training.e_step.continued import ContinuedStep
from vsd.training.job import prompt_of
from vsd.training.random_source import RandomSource
from vsd.training.trainer import VSDTrainer


@pytest.fixture(scope="module")
def examples(tiny_target: Target) -> list[Example]:
    """Answers of different lengths, so that a batch has padding."""
    return [
        Example(Inputs(inputs.ids[:end]), drafted[:end])
        for i, (inputs, drafted, _) in enumerate(tiny_run.tiny_examples(tiny_target, 4))
        for end in [drafted.index(True) + 3 + 3 * i]
    ]


@pytest.fixture
def trainer(tiny_target: Target, examples: list[Example], tmp_path: Path) -> VSDTrainer:
    options = {"anchors": 3, "length": 4, "epochs": 2}
    choice = {"objective": "vsd", "objective_options": options, "per_device_train_batch_size": 4}
    return tiny_run.tiny_trainer(tiny_target, examples, tmp_path, **choice)


def whole(trainer: VSDTrainer) -> Batch:
    return trainer.batch(next(iter(trainer.get_train_dataloader())))


def test_they_begin_where_the_target_is_unsure(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    """Shares of 3,000 roots at every drafted position of every text are those of 1 - p; padding has none."""
    options = {"anchors": 3000, "length": 2}
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, objective="vsd", objective_options=options)
    batch = whole(trainer)
    ids, texts = batch.texts.inputs.ids, batch.texts
    generators = [torch.Generator().manual_seed(i) for i in range(len(ids))]
    found = trainer._e_steps[1]._draw(batch, generators)
    assert not texts.real.all()
    for b, roots in enumerate(found.roots):
        drafted = texts.drafted[b][texts.real[b]]
        p = tiny_target.logits(tiny_target.features(along.text(ids[b : b + 1])).hidden[0, drafted - 1]).softmax(-1)
        doubt = 1 - p.gather(1, ids[b, drafted][:, None])[:, 0]
        share = torch.stack([(roots + 2 == position).float().mean() for position in drafted])
        assert share.sum() == pytest.approx(1)
        assert (share - doubt / doubt.sum()).abs().sum() / 2 < 0.05


def test_they_are_kept_for_some_epochs(trainer: VSDTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in epochs 0 and 1, others in 2; beyond memory from the disk; without room drawn again, and the same."""
    batch, step, drawn = whole(trainer), trainer._e_steps[1], []
    real_one = ContinuedStep._draw

    def counted(self: ContinuedStep, given: Batch, generators: list[torch.Generator]) -> object:
        drawn.append(given.texts.examples.tolist())
        return real_one(self, given, generators)

    monkeypatch.setattr(ContinuedStep, "_draw", counted)

    def tokens(epoch: int, rows: list[int]) -> torch.Tensor:
        posterior, _ = step(batch.some(rows), RandomSource(0, epoch, 0, torch.device("cpu")))
        return posterior.entries.next_ids[:, batch.texts.inputs.ids.shape[1] :]

    first = tokens(0, [0, 1])
    assert torch.equal(tokens(1, [2, 1, 0])[1:], first.flip(0))
    names = batch.texts.examples.tolist()
    assert drawn == [names[:2], names[2:3]]
    assert not torch.equal(tokens(2, [0, 1]), first)
    monkeypatch.setattr(kept, "_MEMORY", sum(field.nbytes for field in step.kept.get(names[0])))
    on_disk = tokens(4, [0, 1, 2, 3])
    folder = step.kept._folder
    assert len(step.kept.memory) == 1 and len(list(folder.iterdir())) == 3
    drawn.clear()
    assert torch.equal(tokens(5, [0, 1, 2, 3]), on_disk) and drawn == []
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    again = tokens(6, [0, 1, 2, 3])
    assert not folder.exists()
    drawn.clear()
    assert torch.equal(tokens(7, [0, 1, 2, 3]), again) and drawn == [names[1:]]


def test_measuring_stops_the_clock(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    prompts = [prompt_of(example) for example in examples]
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, eval_prompts=prompts, max_minutes=1)
    assert trainer._budget is not None
    trainer._budget.start = 100.0
    assert trainer.evaluate()["minutes"] == 0
    assert trainer._budget.start > 100.0
