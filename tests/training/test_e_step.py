"""Where the target's roads not taken begin, and how long they are remembered."""

from pathlib import Path

import pytest
import torch

import tiny_run
from vsd.data import Example
from vsd.objective import Continued
from vsd.targets import Target
from vsd.targets.inputs import Inputs
from vsd.training import e_step
from vsd.training.e_step import Batch, EStep, Posterior
from vsd.training.trainer import VSDTrainer


@pytest.fixture(scope="module")
def examples(tiny_target: Target) -> list[Example]:
    """Answers of different lengths, so that a batch has padding."""
    return [
        Example(Inputs(ids[:end]), drafted[:end])
        for i, ((ids, *_), drafted) in enumerate(tiny_run.tiny_examples(tiny_target, 4))
        for end in [drafted.index(True) + 3 + 3 * i]
    ]


@pytest.fixture
def trainer(tiny_target: Target, examples: list[Example], tmp_path: Path) -> VSDTrainer:
    options = {"anchors": 3, "length": 4, "epochs": 2}
    return tiny_run.tiny_trainer(tiny_target, examples, tmp_path, objective="vsd", objective_options=options)


def whole(trainer: VSDTrainer) -> Batch:
    return trainer.batch(next(iter(trainer.get_train_dataloader())))


def test_roads_begin_where_the_target_was_in_doubt(tiny_target: Target, trainer: VSDTrainer) -> None:
    """Shares of 3,000 roots at every drafted position of every text are those of 1 - p; padding has none."""
    batch, find = whole(trainer), trainer._posterior_of
    generators = [torch.Generator().manual_seed(i) for i in range(len(batch.ids))]
    found = find._continue(batch, Continued(3000, 2), generators)
    assert not batch.real.all()
    for b, (ids, roots) in enumerate(zip(batch.ids, found.roots)):
        drafted = batch.drafted[b][batch.real[b]]
        p = tiny_target.logits(tiny_target.features(ids[None]).hidden[0, drafted - 1]).softmax(-1)
        doubt = 1 - p.gather(1, ids[drafted][:, None])[:, 0]
        share = torch.stack([(roots + 2 == position).float().mean() for position in drafted])
        assert share.sum() == pytest.approx(1)
        assert (share - doubt / doubt.sum()).abs().sum() / 2 < 0.05


def test_they_are_remembered_for_some_epochs(trainer: VSDTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in epochs 0 and 1, others in 2; of what there is no room for, all again, and the same again."""
    batch, find, drawn = whole(trainer), trainer._posterior_of, []
    real_one = EStep._continue

    def counted(self: EStep, some: Batch, *rest: object) -> object:
        drawn.append(some.examples.tolist())
        return real_one(self, some, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(EStep, "_continue", counted)
    part = trainer._objective.parts[1]
    assert isinstance(part.paths, Continued)

    def tokens(epoch: int, rows: list[int]) -> torch.Tensor:
        found: Posterior = find.continued(part, part.paths, batch.some(rows), epoch, trainer._seeded)
        return found.entries.next_ids[:, batch.ids.shape[1] :]  # type: ignore[union-attr]

    first = tokens(0, [0, 1])
    assert torch.equal(tokens(1, [2, 1, 0])[1:], first.flip(0))
    names = batch.examples.tolist()
    assert drawn == [names[:2], names[2:3]]
    assert not torch.equal(tokens(2, [0, 1]), first)
    monkeypatch.setattr(e_step, "_MEMORY", 1)
    again = tokens(4, [0, 1, 2, 3])
    drawn.clear()
    assert torch.equal(tokens(4, [0, 1, 2, 3]), again)
    assert drawn == [names]


def test_measuring_stops_the_clock(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    prompts = [example.inputs.ids[: example.drafted.index(True) - 1] for example in examples]
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, eval_prompts=prompts, max_minutes=1)
    assert trainer._budget is not None
    trainer._budget.start = 100.0
    assert trainer.evaluate()["minutes"] == 0
    assert trainer._budget.start > 100.0
