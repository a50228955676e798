"""`vsd train`: a killed run that ends with the very drafter of a straight one."""

import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import tiny_run
import warm
from vsd import cli
from vsd.data import Example
from vsd.drafters import load_drafter
from vsd.errors import VSDError
from vsd.targets import Inputs, Target, load_target, load_target_info
from vsd.training.job import distinct, hold_out, prompt_of
from vsd.training.trainer import VSDTrainer


def test_held_out_conversations_are_spread_over_the_text() -> None:
    examples = [Example(Inputs([i]), [True]) for i in range(10)]
    kept, held_out = hold_out(examples, 3)
    assert [e.inputs.ids[0] for e in held_out] == [0, 3, 6]
    assert [e.inputs.ids[0] for e in kept] == [1, 2, 4, 5, 7, 8, 9]
    assert hold_out(examples, 0) == (examples, [])
    with pytest.raises(VSDError, match="10 of 10"):
        hold_out(examples, 10)


def test_texts_of_one_conversation_are_held_out_together() -> None:
    talks = [7, 3, 7, 5, 3, 9, 7]
    kept, held_out = hold_out([*"abcdefg"], 2, talks)  # four conversations, in the order 7, 3, 5, 9
    assert held_out == ["a", "c", "d", "g"]  # the first and the third of them
    assert kept == ["b", "e", "f"]
    with pytest.raises(VSDError, match="4 of 4"):
        hold_out([*"abcdefg"], 4, talks)


def test_the_prompt_ends_where_the_first_answer_begins() -> None:
    example = Example(Inputs([1, 2, 3, 4, 5, 6]), [False, False, False, True, True, False])
    again = Example(Inputs([1, 2, 4, 5]), [False, False, False, True])  # another answer to this prompt
    assert [prompt.ids for prompt in distinct(map(prompt_of, [example, again]))] == [
        [1, 2]
    ]  # 3 is the first token of the answer: the target's prefill gives it


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
    options += ["bf16=no"]  # the default is measured, and a busy machine may measure otherwise in the resumed process
    if "--drafter" in more:
        del given["--draft-vocab-size"]
    flags = [str(word) for pair in given.items() for word in pair]
    return ["train", *flags, "--set", *options, "use_cpu=true", *more]


class Slow(TrainerCallback):
    def on_step_end(self, *args: object, **options: object) -> None:
        time.sleep(0.05)


def train_slowly(words: list[str]) -> None:
    """The command, in a process that is killed."""
    real = VSDTrainer.__init__
    VSDTrainer.__init__ = lambda self, *a, **kw: real(self, *a, **{**kw, "callbacks": [Slow()]})
    sys.exit(cli.main(words))


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
    """With `vsd`, weights adapt to a running acceptance and paths are drawn: both must continue where they were.

    Continuations that an interrupted run kept are drawn again, by the same numbers but in other batches, whose sums
    round otherwise on some processors: only there the weights may differ, by rounding.
    """
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = warm.start(train_slowly, arguments(workshop, killed, *options), log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while not (killed / "checkpoint-12" / "trainer_state.json").exists():
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.07)  # somewhere in a later step
    finally:
        process.kill()
        process.join()
    assert not (killed / "drafter").exists()
    assert cli.main(arguments(workshop, straight, *options)) == 0
    assert cli.main(arguments(workshop, killed, *options)) == 1  # not without being told
    assert cli.main(arguments(workshop, killed, *options, "--resume")) == 0
    files = [folder / "drafter" / "model.safetensors" for folder in (straight, killed)]
    if "epochs: 2" not in "".join(options):
        assert files[0].read_bytes() == files[1].read_bytes()
    wanted, found = map(load_file, files)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)


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
    assert f"drafter: {out / 'drafter'}\nreport: {out / 'report.html'}" in capsys.readouterr().out
    before = (out / "drafter" / "model.safetensors").read_bytes()
    assert cli.main(arguments(workshop, out, "max_steps=4")) == 1
    assert "--resume" in capsys.readouterr().err
    assert (out / "drafter" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("length", ["max_minutes=0.003", "patience=1"])
def test_a_run_that_ends_before_its_last_step_has_a_checkpoint(workshop: Path, tmp_path: Path, length: str) -> None:
    """It was ended by the clock, or because τ did not rise; longer, it goes on from there."""
    out = tmp_path / "run"
    options = ["save_steps=1000", "eval_steps=1", "learning_rate=0", length]
    assert cli.main(arguments(workshop, out, *options)) == 0
    (first,) = out.glob("checkpoint-*")
    ended = int(first.name.rpartition("-")[2])
    assert ended < 30
    longer = [*options[:-1], "max_minutes=null", "patience=null", f"max_steps={ended + 2}", "--resume"]
    if length.startswith("patience"):  # the clock's schedule of the learning rate is a setting of its own
        assert cli.main(arguments(workshop, out, *longer)) == 0
        assert (out / f"checkpoint-{ended + 2}").is_dir()


def test_a_run_without_checkpoints_is_neither_overwritten_nor_resumed(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(arguments(workshop, out, "max_steps=2", "save_strategy=no")) == 0
    before = (out / "drafter" / "model.safetensors").read_bytes()
    capsys.readouterr()
    for more, what in (([], "holds a run already"), (["--resume"], "ended without checkpoints")):
        assert cli.main(arguments(workshop, out, "max_steps=2", "save_strategy=no", *more)) == 1
        error = capsys.readouterr().err
        assert what in error and "--output-dir" in error
    assert (out / "drafter" / "model.safetensors").read_bytes() == before


def test_a_run_is_not_resumed_on_other_text(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files have the same names; one line more changes the order and what is trained on."""
    shop, out = tmp_path / "shop", tmp_path / "run"
    shutil.copytree(workshop, shop)
    given = arguments(shop, out, "max_steps=4", "--features", "online")
    assert cli.main(given) == 0
    text = (shop / "text.jsonl").read_text()
    (shop / "text.jsonl").write_text(text + text.splitlines(keepends=True)[1])
    longer = ["max_steps=8" if word == "max_steps=4" else word for word in given] + ["--resume"]
    assert cli.main(longer) == 1
    assert "was trained on other text" in capsys.readouterr().err
    (shop / "text.jsonl").write_text(text)
    assert cli.main(longer) == 0


def test_a_run_is_not_resumed_with_other_settings(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record in the output folder is compared; the length of the training may change."""
    out = tmp_path / "run"
    assert cli.main(arguments(workshop, out, "max_steps=4")) == 0
    before = (out / "drafter" / "model.safetensors").read_bytes()
    assert cli.main(arguments(workshop, out, "max_steps=8", "learning_rate=5e-4", "--resume")) == 1
    error = capsys.readouterr().err
    assert "learning_rate was None, now 0.0005" in error and "max_steps" not in error and error.count("\n") == 1
    assert (out / "drafter" / "model.safetensors").read_bytes() == before
    assert cli.main(arguments(workshop, out, "max_steps=8", "--resume")) == 0
    assert (out / "checkpoint-8").is_dir()


def test_the_recorded_recipe_makes_the_drafter_again(workshop: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    options = ["max_steps=3", "seed=3", "objective_options={decay: 0.7}", "adam_beta1=0.8"]
    assert cli.main(arguments(workshop, first, *options)) == 0
    assert cli.main(["train", "--config", str(first / "recipe.json"), "--output-dir", str(again)]) == 0
    wanted = (first / "drafter" / "model.safetensors").read_bytes()
    assert (again / "drafter" / "model.safetensors").read_bytes() == wanted


def test_the_revision_of_the_target_is_loaded(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def refuse(name: str, **options: object) -> None:
        asked.update(options)
        raise VSDError("not now")

    monkeypatch.setattr("vsd.training.job.load_target", refuse)
    assert cli.main(arguments(workshop, tmp_path, "--revision", "v2", "--trust-remote-code")) == 1
    assert (asked["revision"], asked["trust_remote_code"]) == ("v2", True)


@pytest.mark.parametrize("options", [[], ["--family", "peagle"], ["--online", "--answer-tokens", "8"]], ids=" ".join)
def test_a_drafter_of_another_target_is_trained_further_for_this_one(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """As for a fine-tuned target: the drafter of the plain one is the start, and the result belongs to the new one."""
    plain, tuned = load_target(str(workshop / "target"), dtype="float32", pack=False), tmp_path / "tuned"
    shutil.copytree(workshop / "target", tuned)
    with torch.no_grad():
        plain.model.lm_head.weight.mul_(1.5)
    tiny_run.write_target(plain, tuned)
    assert cli.main(arguments(workshop, tmp_path / "first", "--set", "max_steps=1")) == 0
    start = str(tmp_path / "first" / "drafter")
    assert "another target" not in capsys.readouterr().out
    given = arguments(workshop, tmp_path / "second", "--drafter", start, *options, "--set", "max_steps=1")
    given[given.index("--target") + 1] = str(tuned)
    assert cli.main(given) == 0
    assert "was trained for another target" in capsys.readouterr().out
    found, info = tmp_path / "second" / "drafter", load_target_info(str(tuned))
    assert load_drafter(found, info).config.target_fingerprint != load_drafter(start, plain).config.target_fingerprint
    with pytest.raises(VSDError, match="trained for another target: fingerprint"):
        load_drafter(found, load_target_info(str(workshop / "target")))


def test_training_starts_from_a_given_drafter(workshop: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(arguments(workshop, first, "max_steps=2")) == 0
    start = ["max_steps=1", "learning_rate=0", "--drafter", str(first / "drafter"), "--features", "online"]
    assert cli.main(arguments(workshop, second, *start)) == 0
    mine, theirs = (f / "drafter" / "model.safetensors" for f in (second, first))
    assert mine.read_bytes() == theirs.read_bytes()
    assert not (second / "features").exists()


def test_recorded_text_with_stored_features_needs_no_layers_of_the_target(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run on one text reads tokenizer, embedding and head alone; an E-step that needs more says so."""
    shared = tmp_path / "features"
    words = ["max_steps=2", "--features", str(shared), "--held-out", "0"]
    assert cli.main(arguments(workshop, tmp_path / "first", *words)) == 0

    def never(*args: object, **options: object) -> Target:
        raise AssertionError("the layers were loaded")

    monkeypatch.setattr("vsd.training.job.load_target", never)
    assert cli.main(arguments(workshop, tmp_path / "second", *words)) == 0
    mine, theirs = (tmp_path / name / "drafter" / "model.safetensors" for name in ("second", "first"))
    assert mine.read_bytes() == theirs.read_bytes()
    with pytest.raises(AssertionError, match="layers were loaded"):
        cli.main(arguments(workshop, tmp_path / "third", *words, "--objective", "vsd"))


def test_features_of_large_targets_and_full_disks_are_not_stored_unless_asked_for(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(name: str, *more: str) -> str:
        assert cli.main(arguments(workshop, tmp_path / name, "max_steps=1", "--held-out", "0", *more)) == 0
        return next((line for line in capsys.readouterr().out.splitlines() if line.startswith("target features")), "")

    assert re.search(r"0\.\d\d GB, stored in .*small/features", said("small"))
    assert (tmp_path / "small" / "features" / "manifest.json").exists()
    monkeypatch.setattr("vsd.training.job._LARGE", 1000)
    assert "computed in every step, as the target has 0.0 billion parameters" in said("large")
    assert not (tmp_path / "large" / "features").exists()
    assert "stored in" in said("asked", "--features", "store")
    monkeypatch.undo()
    full = SimpleNamespace(free=10)
    monkeypatch.setattr("vsd.training.job.shutil.disk_usage", lambda folder: full)
    assert "GB and 0.0 GB are free" in said("full")
    assert not (tmp_path / "full" / "features").exists()
