"""Online training: rollouts hold what a pass over the text gives, runs resume, and acceptance rises."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from vsd import cli
from vsd.data import Example
from vsd.decoding import Engine, Sampling
from vsd.drafters import load_drafter
from vsd.errors import ConfigurationError, DataError, MismatchError
from vsd.features import compute_features
from vsd.options import OnlineOptions
from vsd.paths import TreeShape
from vsd.targets import Inputs, Padded, Target
from vsd.training import VSDConfig, VSDTrainer
from vsd.training.online import OnlineText, load_prompts, roll_out


@pytest.fixture(scope="module")
def examples(tiny_target: Target) -> list[Example]:
    return tiny_run.tiny_examples(tiny_target, 12)


@pytest.fixture(scope="module")
def prompts(examples: list[Example]) -> list[Inputs]:
    return [tiny_run.prompt_of(example) for example in examples]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("tree", [None, "3", "3x2x6"])
def test_a_rollout_is_what_a_pass_over_the_text_gives(
    tiny_target: Target, examples: list[Example], prompts: list[Inputs], tree: str | None, temperature: float
) -> None:
    drafter = tiny_run.tiny_drafter(tiny_target, examples)
    layers = drafter.needs.layers
    shape = TreeShape.parse(tree) if tree else None
    engine = Engine(tiny_target, drafter if tree else None, shape, layers=layers)
    samplings = [Sampling(9 + i % 5, temperature, seed=i) for i in range(len(prompts))]
    found = roll_out(engine, prompts, samplings, 0.7)
    answers = Engine(tiny_target).generate(prompts, samplings)
    assert [rollout.response for rollout in found] == [a.tokens for a in answers if len(a.tokens) > 1]
    for rollout in found:
        text, start = rollout.prompt + rollout.response, len(rollout.prompt)
        drafted = torch.arange(start + 1, len(text))[None]
        wanted = compute_features(tiny_target, Padded.of([Inputs(text)]), drafted, layers, 0.7)
        aux, hidden, normaliser = rollout.features
        torch.testing.assert_close(aux[:-1].float(), wanted.aux[0, :-1], rtol=1e-2, atol=2e-2)
        torch.testing.assert_close(hidden.float(), wanted.hidden[0], rtol=1e-2, atol=2e-2)
        torch.testing.assert_close(normaliser, wanted.log_normaliser[0], rtol=1e-2, atol=2e-2)
        assert len(aux) == len(text)


def online_trainer(
    target: Target,
    examples: list[Example],
    folder: Path,
    online: dict[str, Any],
    prompts: list[Inputs],
    **options: Any,
) -> VSDTrainer:
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False, "draft_steps": 3}
    config = VSDConfig(output_dir=str(folder), **{"per_device_train_batch_size": 2, **quiet, **options})
    drafter = tiny_run.tiny_drafter(target, examples)
    settings = OnlineOptions(online=True, **{"answer_tokens": 12, "round_prompts": 4, **online})
    texts = OnlineText(folder / "online", target, drafter, prompts, settings, seed=3)
    return VSDTrainer(target, drafter, config, texts, features=texts, eval_prompts=prompts)


def rounds(folder: Path, kind: str = "json") -> list[int]:
    found = (folder / "online").glob(f"round-*.{kind}")
    return sorted(int(path.name.split(".")[0].removeprefix("round-")) for path in found)


def test_greedy_answers_are_given_once_and_sampled_ones_in_every_epoch(
    tiny_target: Target, examples: list[Example], prompts: list[Inputs], tmp_path: Path
) -> None:
    for temperature, count in ((0.0, 3), (1.0, 6)):
        folder = tmp_path / str(temperature)
        online = {"answer_temperature": temperature, "replay": 1.0}
        trainer = online_trainer(tiny_target, examples, folder, online, prompts, num_train_epochs=2)
        trainer.train()
        assert rounds(folder) == list(range(count))
        assert trainer.state.global_step == 2 * 12 / 2  # every prompt once in each epoch, in batches of two
    first = [json.loads((tmp_path / f"1.0/online/round-{n:05d}.json").read_text())[0] for n in range(6)]
    asked = [sorted(tuple(prompt) for part in half for prompt, _, _ in part) for half in (first[:3], first[3:])]
    assert len(set(asked[0])) >= 10 and set(asked[0]) <= {tuple(prompt.ids) for prompt in prompts}
    answers = [{tuple(response) for part in half for _, response, _ in part} for half in (first[:3], first[3:])]
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("e_step", "temperature", "step"),
    [(None, 1.0, 4), ("continued", 1.0, 4), (None, 1.0, 12), (None, 1.0, 14), (None, 0.0, 14)],
)
def test_a_killed_run_ends_as_one_that_was_not(
    tiny_target: Target,
    examples: list[Example],
    prompts: list[Inputs],
    tmp_path: Path,
    e_step: str | None,
    temperature: float,
    step: int,
) -> None:
    """Killed behind the checkpoint of `step`, while a round was written. An epoch has 12 steps."""
    online = {"buffer": 8, "answer_temperature": temperature}
    more = {"e_step": e_step, **({"anchors": 2, "length": 3} if e_step else {})}
    options = {"objective": "vsd", "objective_options": more, "learning_rate": 1e-2}
    saved = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}

    def trained(folder: Path, **kept: Any) -> VSDTrainer:
        return online_trainer(tiny_target, examples, folder, online, prompts, max_steps=step + 10, **options, **kept)

    straight = trained(tmp_path / "straight", **saved)
    straight.train()
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "straight", killed)
    for late in (p for p in killed.glob("checkpoint-*") if p.name != f"checkpoint-{step}"):
        shutil.rmtree(late)
    last = max(rounds(killed))
    assert last >= 2
    if temperature > 0:  # greedy answers are all given in the first epoch
        (killed / "online" / f"round-{last:05d}.json").rename(killed / "online" / f"round-{last:05d}.part")
    resumed = trained(killed)
    resumed.train(resume_from_checkpoint=str(killed / f"checkpoint-{step}"))
    assert rounds(killed) == rounds(tmp_path / "straight")
    wanted = straight.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-6, atol=1e-6, msg=name)


def test_two_processes_go_on_as_one(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    """Under `torchrun` each process answers its share of a round; a run of one process is resumed inside a round."""
    tiny_run.write_target(tiny_target, tmp_path / "target")
    tiny_run.write_text(tiny_target, tmp_path / "text.jsonl", 13)
    tiny_run.tiny_drafter(tiny_target, examples).save_pretrained(tmp_path / "start")
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["train", "--online", "--target", tmp_path / "target", "--drafter", tmp_path / "start"]
    words += ["--data", tmp_path / "text.jsonl", "--answer-tokens", 12, "--round-prompts", 5, "--buffer", 10]
    words += ["--held-out", 2, "--max-steps", 6, "--save-steps", 1, "--device", "cpu", "--dtype", "float32"]
    words += ["--set", "warmup_steps=0", "report_to=none", "bf16=false", "adam_epsilon=1e-2", "save_total_limit=9"]
    assert cli.main([*map(str, words), "per_device_train_batch_size=4", "--output-dir", str(one)]) == 0
    shutil.copytree(one, two)
    for late in (two / f"checkpoint-{step}" for step in (4, 5, 6)):  # two steps a round: step 3 is inside round 1
        shutil.rmtree(late)
    (two / "trainer_state.json").unlink()
    for path in (two / "online").glob("round-00002.*"):  # the last one of an epoch, with a single prompt
        path.unlink()
    division = ["per_device_train_batch_size=1", "gradient_accumulation_steps=2"]
    tiny_run.torchrun([*words, *division, "--output-dir", two, "--resume"])
    wanted, found = (load_file(run / "drafter" / "model.safetensors") for run in (one, two))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert rounds(two) == rounds(one)
    parts = {n: len(list((two / "online").glob(f"round-0000{n}.*.safetensors"))) for n in (1, 2)}
    assert parts == {1: 1, 2: 2}


@pytest.mark.parametrize("option", ["dataloader_num_workers=1", "accelerator_config={dispatch_batches: true}"])
def test_loading_in_other_processes_is_refused(tmp_path: Path, option: str, capsys: Any) -> None:
    words = ["train", "--online", "--drafter", "smollm2-135m-eagle3", "--data", "x", "--output-dir", str(tmp_path)]
    assert cli.main([*words, "--set", option]) == 1
    name = option.split("=")[0] if "{" not in option else "dispatch_batches"
    assert f"leave out {name}" in capsys.readouterr().err


def test_features_behind_the_buffer_of_every_checkpoint_are_deleted(
    tiny_target: Target, examples: list[Example], prompts: list[Inputs], tmp_path: Path
) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1, "max_steps": 24}
    online_trainer(tiny_target, examples, tmp_path, {"buffer": 8, "replay": 1.0}, prompts, **options).train()
    assert rounds(tmp_path) == list(range(12))  # of four prompts, which are two steps
    # A run that goes on from checkpoint 24 is trained on round 12, and on round 11 from the buffer.
    assert rounds(tmp_path, "safetensors") == [11]


def test_a_round_fills_whole_steps(
    tiny_target: Target, examples: list[Example], prompts: list[Inputs], tmp_path: Path
) -> None:
    """A round of 4 prompts is trained on for one step, of two batches of 4 texts."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 5}
    saved = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    online = {"buffer": 8, "replay": 1.0}
    online_trainer(tiny_target, examples, tmp_path, online, prompts[:4], **options, **saved).train()
    assert rounds(tmp_path) == list(range(5))
    assert rounds(tmp_path, "safetensors") == [4]  # checkpoint 5 goes on with round 5, and round 4 from the buffer


def test_new_texts_come_first_and_old_ones_by_their_passes(
    tiny_target: Target, examples: list[Example], prompts: list[Inputs], tmp_path: Path
) -> None:
    drafter = tiny_run.tiny_drafter(tiny_target, examples)
    options = OnlineOptions(online=True, answer_tokens=12, round_prompts=4, replay=2.0, buffer=8)
    text = OnlineText(tmp_path, tiny_target, drafter, prompts, options, seed=3)
    order = list(text.order(0, 2))
    assert len(order) == 3 * 8
    for number in range(3):
        chosen = order[8 * number : 8 * number + 8]
        new = {i for i in text.rounds.texts if i // 4 == number}
        assert new <= set(chosen)
        assert all(number - 1 <= i // 4 <= number for i in chosen)
    text.rounds.texts = {i: one._replace(passes=1 + i % 5) for i, one in text.rounds.texts.items()}
    number, drawn = 2, torch.zeros(12)
    for seed in range(400):
        text.seed = seed
        drawn += torch.bincount(torch.tensor(text._chosen(number, [], 2)), minlength=12)
    passes = torch.tensor([float(text.rounds.texts[i].passes) if i in text.rounds.texts else 0.0 for i in range(12)])
    wanted = passes[4:] / passes[4:].sum()
    assert float(drawn[:4].sum()) == 0
    assert torch.allclose(drawn[4:] / drawn.sum(), wanted, atol=4 * 0.5 / (400 * 8) ** 0.5)  # four standard errors


def test_training_raises_acceptance(
    tiny_target: Target, examples: list[Example], prompts: list[Inputs], tmp_path: Path
) -> None:
    online = {"answer_temperature": 0.0, "answer_tokens": 24, "replay": 20.0}
    options = {"learning_rate": 1e-2, "max_steps": 240, "eval_max_new_tokens": 20}
    trainer = online_trainer(tiny_target, examples, tmp_path, online, prompts, **options)
    before = trainer.evaluate()["eval_tau"]
    trainer.train()
    assert trainer.evaluate()["eval_tau"] > before + 0.8


def test_answers_of_another_run_are_refused(
    tiny_target: Target, examples: list[Example], prompts: list[Inputs], tmp_path: Path
) -> None:
    online_trainer(tiny_target, examples, tmp_path, {}, prompts)
    with pytest.raises(MismatchError, match="another sampling"):
        online_trainer(tiny_target, examples, tmp_path, {"answer_tokens": 5}, prompts)
    with pytest.raises(MismatchError, match="another prompts"):
        online_trainer(tiny_target, examples, tmp_path, {}, prompts[1:])


@pytest.mark.parametrize(
    ("online", "reason"),
    [
        ({"answer_tokens": 1}, "answer_tokens must be at least 2"),
        ({"replay": 0.0}, "replay must be positive"),
        ({"answer_temperature": -1.0}, "answer_temperature must be 0 or more"),
        ({"answer_tokens": 5000}, "leave the target's context"),
        ({"answer_tree": "3x0x1"}, "tree"),
    ],
)
def test_settings_without_meaning_are_refused(
    tiny_target: Target,
    examples: list[Example],
    prompts: list[Inputs],
    tmp_path: Path,
    online: dict[str, Any],
    reason: str,
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        online_trainer(tiny_target, examples, tmp_path, online, prompts)


def test_every_turn_with_a_recorded_past_is_a_prompt(tiny_target: Target, tmp_path: Path) -> None:
    said = [("user", "hi"), ("assistant", "name"), ("user", "who"), ("assistant", "why"), ("user", "how")]
    lines = [
        {"messages": [{"role": role, "content": text} for role, text in said]},
        {"turns": ["what is", "never asked"]},
        {"prompt_ids": [5, 6, 7]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load_prompts(path, tiny_target.tokenizer, 100)
    assert len(found) == 5
    ids = [one.inputs.ids for one in found]
    assert ids[4] == [5, 6, 7]
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(ids[:3]))
    talk, question, tokens = {one.opening for one in found[:3]}, found[3].opening, found[4].opening
    assert len(talk) == 1 and len({*talk, question, tokens}) == 3  # held out with all its turns, or not at all
    with pytest.raises(DataError, match=r"prompts.jsonl:1: too long"):
        load_prompts(path, tiny_target.tokenizer, 5)


class TestBest:
    """The drafter with the highest τ is the result."""

    def test_it_is_kept(self, tiny_target: Target, examples: list[Example], tmp_path: Path, monkeypatch: Any) -> None:
        taus = iter([1.5, 1.9, 1.7, 1.6])
        monkeypatch.setattr(VSDTrainer, "_tau", lambda self, drafter: next(taus))
        choice = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "patience": 2, "logging_steps": 1}
        trainer = tiny_run.tiny_trainer(
            tiny_target, examples, tmp_path, eval_prompts=[Inputs([1, 2])], learning_rate=1e-2, **choice
        )
        seen = {}
        old = trainer._keep_best

        def spy(tau: float) -> None:
            seen[tau] = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
            old(tau)

        monkeypatch.setattr(trainer, "_keep_best", spy)
        trainer.train()
        assert list(seen) == [1.5, 1.9, 1.7, 1.6] and trainer.state.global_step == 8
        kept = load_drafter(trainer.best, tiny_target).state_dict()
        assert all(torch.equal(kept[name], seen[1.9][name]) for name in kept if name in seen[1.9])

    def test_a_flat_run_ends(
        self, tiny_target: Target, examples: list[Example], tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(VSDTrainer, "_tau", lambda self, drafter: 1.5)
        choice = {"max_steps": 20, "eval_strategy": "steps", "eval_steps": 1, "patience": 3}
        trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, eval_prompts=[Inputs([1, 2])], **choice)
        trainer.train()
        assert trainer.state.global_step == 4


def test_the_command(tiny_target: Target, examples: list[Example], tmp_path: Path, capsys: Any) -> None:
    tiny_run.write_target(tiny_target, tmp_path / "target")
    tiny_run.tiny_drafter(tiny_target, examples).save_pretrained(tmp_path / "drafter")
    rows = [{"prompt": f"{word} {i}"} for i, word in enumerate(tiny_run.WORDS * 2)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "--online", "--data", tmp_path / "prompts.jsonl", "--output-dir", tmp_path / "run"]
    words += ["--target", tmp_path / "target", "--dtype", "float32", "--held-out", 4, "--answer-tokens", 10]
    words += ["--max-steps", 6, "--eval-steps", 3, "--eval-max-new-tokens", 8]
    words += ["--set", "report_to=none", "disable_tqdm=true", "use_cpu=true"]
    assert cli.main(list(map(str, words))) == 1
    assert "give the one to continue from, --drafter FOLDER" in capsys.readouterr().err
    words[1:1] = ["--drafter", tmp_path / "drafter"]
    assert cli.main(list(map(str, words))) == 0
    assert (tmp_path / "run" / "drafter" / "config.json").exists()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert sum("eval_tau" in entry for entry in state["log_history"]) == 2
