"""`vsd train`: what a recipe means, and a killed run that ends with the very drafter of a straight one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tiny_run
from vsd import cli
from vsd.data import Example
from vsd.errors import VSDError
from vsd.targets import Target
from vsd.targets.inputs import Inputs
from vsd.training.job import hold_out, prompt_of, recipe

# ---- recipes


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_flags_beat_set_beats_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "data: [a.jsonl, b.jsonl]\nmax_length: 1\nheld_out: 1\ndraft_vocab_size: 1\n"
        "learning_rate: 1e-3\nweight_decay: 1e-2\nreport_to: none\n",
    )
    job, config = recipe(
        path,
        ["max_length=2", "held_out=2", "learning_rate=2e-3", "lr_scheduler_type=linear"],
        {"held_out": 3, "output_dir": str(tmp_path / "out")},
    )
    assert (job.draft_vocab_size, job.max_length, job.held_out) == (1, 2, 3)
    assert job.data == ["a.jsonl", "b.jsonl"]
    assert config.learning_rate == 2e-3 and config.weight_decay == 1e-2  # numbers, not YAML 1.1's strings
    assert config.lr_scheduler_type == "linear"
    assert (job.output_dir, config.output_dir) == (str(tmp_path / "out"), str(tmp_path / "out"))


def test_no_is_a_strategy_not_a_falsehood() -> None:
    config = recipe(None, ["data=a.jsonl", "save_strategy=no", "eval_strategy=no", "bf16=no"], {})[1]
    assert (config.save_strategy, config.eval_strategy, config.bf16) == ("no", "no", False)


def test_defaults_are_for_drafters() -> None:
    job, config = recipe(None, ["data=a.jsonl"], {})
    assert job.data == ["a.jsonl"]
    assert (config.learning_rate, config.draft_steps, config.per_device_train_batch_size) == (1e-3, 5, 8)
    assert config.eval_strategy == "steps" and config.remove_unused_columns is False
    assert recipe(None, ["data=a.jsonl", "held_out=0"], {})[1].eval_strategy == "no"
    assert recipe(None, ["data=a.jsonl", "eval_steps=7"], {})[1].eval_steps == 7


def test_the_cpu_is_taken_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside a GPU, by target and drafter alike."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    configs = {name: recipe(None, ["data=a.jsonl", "bf16=no", f"device={name}"], {})[1] for name in ("auto", "cpu")}
    assert {name: config.use_cpu for name, config in configs.items()} == {"auto": False, "cpu": True}


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["data=a.jsonl", "lerning_rate=1"], "unknown option lerning_rate"),
        (["data=a.jsonl", "learning_rate"], "KEY=VALUE, not 'learning_rate'"),
        (["learning_rate=1"], "no training text"),
        (["data=a.jsonl", "features=sometimes"], "features must be store, online or a folder"),
        (["data=a.jsonl", "on_bad_line=explode"], "on_bad_line must be one of fatal, skip"),
        (["data=a.jsonl", "lr_scheduler_type=zigzag"], "bad training option"),
        (["data=a.jsonl", "draft_steps=0"], "draft_steps"),
        (["data=a.jsonl", "held_out=many"], "held_out"),
        (["data=a.jsonl", "max_length=[1"], "max_length"),
        (["data=a.jsonl", "learning_rate=fast"], "learning_rate"),
        (["data=a.jsonl", "device=cuda:77"], "device 'cuda:77': this process would train on"),
    ],
)
def test_mistakes_in_a_recipe_are_named(overrides: list[str], what: str) -> None:
    with pytest.raises(VSDError, match=what) as caught:
        recipe(None, overrides, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [("a: [1", "is not YAML"), ("- a\n- b\n", "KEY: VALUE"), ("just words", "KEY: VALUE"), ("", "KEY: VALUE")],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(VSDError, match=what) as caught:
        recipe(write(tmp_path, text), [], {})
    assert "\n" not in str(caught.value)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(VSDError, match="no recipe at"):
        recipe(tmp_path / "nowhere.yaml", [], {})


def test_held_out_conversations_are_spread_over_the_text() -> None:
    examples = [Example(Inputs([i]), [True]) for i in range(10)]
    kept, held_out = hold_out(examples, 3)
    assert [e.inputs.ids[0] for e in held_out] == [0, 3, 6]
    assert [e.inputs.ids[0] for e in kept] == [1, 2, 4, 5, 7, 8, 9]
    assert hold_out(examples, 0) == (examples, [])
    with pytest.raises(VSDError, match="10 of 10"):
        hold_out(examples, 10)


def test_the_prompt_ends_where_the_first_answer_begins() -> None:
    example = Example(Inputs([1, 2, 3, 4, 5, 6]), [False, False, False, True, True, False])
    assert prompt_of(example) == [1, 2]  # 3 is the first token of the answer: the target's prefill gives it


# ---- runs


@pytest.fixture(scope="module")
def workshop(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/ and text.jsonl."""
    folder = tmp_path_factory.mktemp("workshop")
    tiny_run.write_target(tiny_target, folder / "target")
    tiny_run.write_text(tiny_target, folder / "text.jsonl", 34)
    return folder


def arguments(workshop: Path, out: Path, *more: str) -> list[str]:
    """Thirty conversations, three epochs of ten steps, a checkpoint every four steps."""
    given = {
        "--target": workshop / "target",
        "--data": workshop / "text.jsonl",
        "--output-dir": out,
        "--dtype": "float32",
        "--held-out": 4,
        "--draft-vocab-size": 64,
    }
    options = ["num_train_epochs=3", "per_device_train_batch_size=3", "save_steps=4", "logging_steps=2"]
    options += ["eval_steps=8", "eval_max_new_tokens=8", "draft_steps=3", "report_to=none", "disable_tqdm=true"]
    flags = [str(word) for pair in given.items() for word in pair]
    return ["train", *flags, "--set", *options, "use_cpu=true", *more]


KILLED = """
import sys, time
from transformers import TrainerCallback
from vsd import cli
from vsd.training.trainer import VSDTrainer

class Slow(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        time.sleep(0.05)

real = VSDTrainer.__init__
VSDTrainer.__init__ = lambda self, *a, **kw: real(self, *a, **{**kw, "callbacks": [Slow()]})
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["objective=vsd", "objective_options={arw: true, car: 0.5, anchors: 2, length: 3, epochs: 2}"],
        ["objective=vsd", "objective_options={rule: rejection, arw: true, e_step: drafted, samples: 3, every: 2}"],
    ],
    ids=["eagle3", "vsd", "vsd-drafted"],
)
def test_killed_and_resumed_is_straight_bit_for_bit(workshop: Path, tmp_path: Path, options: list[str]) -> None:
    """With `vsd`, weights adapt to a running acceptance and paths are drawn: both must continue where they were."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments(workshop, killed, *options)])
    try:
        assert cli.main(arguments(workshop, straight, *options)) == 0  # meanwhile
        deadline = time.monotonic() + 120
        while not (killed / "checkpoint-12" / "trainer_state.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.07)  # somewhere in a later step
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (killed / "drafter").exists()
    assert cli.main(arguments(workshop, killed, *options)) == 1  # not without being told
    assert cli.main(arguments(workshop, killed, *options, "--resume")) == 0
    wanted = (straight / "drafter" / "model.safetensors").read_bytes()
    assert (killed / "drafter" / "model.safetensors").read_bytes() == wanted


def test_runs_on_the_same_text_share_features(workshop: Path, tmp_path: Path) -> None:
    shared, seen = tmp_path / "features", []
    for name in ("first", "second"):
        assert cli.main(arguments(workshop, tmp_path / name, "max_steps=1", "--features", str(shared))) == 0
        assert not (tmp_path / name / "features").exists()
        seen.append({path: path.stat().st_mtime_ns for path in shared.glob("*.safetensors")})
    assert seen[0] and seen[0] == seen[1]


def test_a_torn_checkpoint_is_passed_over(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A kill while a checkpoint is written: the one before is continued."""
    out = tmp_path / "run"
    assert cli.main(arguments(workshop, out)) == 0
    wanted = (out / "drafter" / "model.safetensors").read_bytes()
    last, before = out / "checkpoint-30", out / "checkpoint-28"
    assert before.is_dir()
    (last / "trainer_state.json").unlink()
    (last / "optimizer.pt").write_bytes(b"torn")
    shutil.rmtree(out / "drafter")
    assert cli.main(arguments(workshop, out, "--resume")) == 0
    assert (out / "drafter" / "model.safetensors").read_bytes() == wanted


def test_a_finished_run_is_not_overwritten(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main(arguments(workshop, out, "max_steps=4")) == 0
    assert capsys.readouterr().out.strip().endswith(f"drafter: {out / 'drafter'}")
    before = (out / "drafter" / "model.safetensors").read_bytes()
    assert cli.main(arguments(workshop, out, "max_steps=4")) == 1
    assert "--resume" in capsys.readouterr().err
    assert (out / "drafter" / "model.safetensors").read_bytes() == before


def test_training_starts_from_a_given_drafter(workshop: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(arguments(workshop, first, "max_steps=2")) == 0
    start = ["max_steps=1", "learning_rate=0", "--drafter", str(first / "drafter"), "--features", "online"]
    assert cli.main(arguments(workshop, second, *start)) == 0
    mine, theirs = (f / "drafter" / "model.safetensors" for f in (second, first))
    assert mine.read_bytes() == theirs.read_bytes()
    assert not (second / "features").exists()
