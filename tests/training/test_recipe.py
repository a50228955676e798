"""Recipes: precedence, types of values, and the record of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vsd import __version__
from vsd.errors import MismatchError, VSDError
from vsd.options import MeasurementOptions, ObjectiveOptions, OptimisationOptions, TrainJob
from vsd.options.job import EMBEDDED
from vsd.paths import TreeShape
from vsd.targets import load
from vsd.training import VSDConfig
from vsd.training.recipe import MAY_CHANGE, check_resumable, recipe, write_recipe


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
    assert config.learning_rate == 2e-3 and config.weight_decay == 1e-2  # numbers, not strings, as in YAML 1.1
    assert config.lr_scheduler_type == "linear"
    assert (job.output_dir, config.output_dir) == (str(tmp_path / "out"), str(tmp_path / "out"))


def test_dotted_overrides_merge_into_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, "data: a.jsonl\nobjective: vsd\nobjective_options: {car: 5e-1, anchors: 4}\n")
    options = recipe(path, ["objective_options.anchors=8"], {})[1].objective_options
    assert options == {"car": 0.5, "anchors": 8}
    options = recipe(path, ["objective_options.anchors=8"], {"objective_options": {"anchors": 16}})[1].objective_options
    assert options == {"car": 0.5, "anchors": 16}
    assert recipe(path, ["objective_options={length: 8}"], {})[1].objective_options == {"length": 8}
    assert recipe(None, ["data=a", "drafter_options.num_hidden_layers=2"], {})[0].drafter_options == {
        "num_hidden_layers": 2
    }


def test_a_number_is_a_number_in_every_notation() -> None:
    for text in ("5e-1", "0.5", ".5", "5.0e-1"):
        overrides = ["data=a.jsonl", f"learning_rate={text}", "objective=vsd", f"objective_options={{car: {text}}}"]
        config = recipe(None, overrides, {})[1]
        assert config.learning_rate == 0.5 and config.objective_options["car"] == 0.5
    assert recipe(None, ["data=a.jsonl", "max_steps=1e3"], {})[1].max_steps == 1000


def test_no_is_a_strategy_not_a_falsehood() -> None:
    config = recipe(None, ["data=a.jsonl", "save_strategy=no", "eval_strategy=no", "bf16=no"], {})[1]
    assert (config.save_strategy, config.eval_strategy, config.bf16) == ("no", "no", False)


def test_defaults_are_for_drafters() -> None:
    job, config = recipe(None, ["data=a.jsonl"], {})
    assert job.data == ["a.jsonl"]
    assert (config.learning_rate, config.draft_steps, config.per_device_train_batch_size) == (None, 5, 8)
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
        (["data=a.jsonl", "features=sometimes"], "features must be auto, store, online, a server's URL or a folder"),
        (["data=a.jsonl", "on_bad_line=explode"], "on_bad_line must be fatal or skip, not 'explode'"),
        (["data=a.jsonl", "lr_scheduler_type=zigzag"], "bad training option lr_scheduler_type: "),
        (["data=a.jsonl", "max_minutes=5", "warmup_steps=100"], "warmup_steps 100 are steps"),
        (["data=a.jsonl", "max_minutes=5", "lr_scheduler_type=linear"], "lr_scheduler_type linear counts steps"),
        (["data=a.jsonl", "draft_steps=0"], "draft_steps"),
        (["data=a.jsonl", "draft_steps=2.5"], "draft_steps must be an integer, not 2.5"),
        (["data=a.jsonl", "draft_steps=null"], "draft_steps must be an integer, not None"),
        (["data=a.jsonl", "trust_remote_code=perhaps"], "trust_remote_code must be true or false, not 'perhaps'"),
        (["data=a.jsonl", "warmup_steps=true"], "warmup_steps must be a number, not True"),
        (["data=a.jsonl", "adam_beta1=high"], "adam_beta1 must be a number, not 'high'"),
        (["data=a.jsonl", "tree=5x4"], "a tree is depth x top_k x nodes"),
        (["data=a.jsonl", "objective_options=8"], "objective_options must be a mapping"),
        (["data=a.jsonl", "objective_options.depth=8"], "objective eagle3 has no option depth: its options are decay"),
        (["data=a.jsonl", "objective_options.decay=fast"], "objective eagle3: decay must be a number, not 'fast'"),
        (["data=a.jsonl", "objective=vsd", "objective_options={hard: maybe}"], "hard must be true or false"),
        (["data=a.jsonl", "objective=gto", "objective_options={anchors: 2.5}"], "anchors must be an integer, not 2.5"),
        (
            ["data=a.jsonl", "objective=gto", "objective_options={tree: 5}", "learning_rate.x=1"],
            "learning_rate must be",
        ),
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


# ---- the record of a run


def made(folder: Path, *overrides: str) -> tuple[TrainJob, VSDConfig]:
    return recipe(None, ["data=a.jsonl", f"output_dir={folder}", *overrides], {})


def test_the_record_is_whole_and_a_recipe(tmp_path: Path) -> None:
    job, config = made(tmp_path, "objective_options={decay: 0.7}", "weight_decay=0.1", "max_minutes=3", "bf16=null")
    write_recipe(tmp_path, job, config)
    record = json.loads((tmp_path / "recipe.json").read_text())
    assert record["versions"].keys() == {"vsd", "torch", "transformers"} and record["versions"]["vsd"] == __version__
    for kind in (TrainJob, ObjectiveOptions, OptimisationOptions, MeasurementOptions):
        assert kind.__dataclass_fields__.keys() <= record.keys()
    assert record["bf16"] is None and record["max_steps"] == -1  # as given, not as this device has it
    assert "fsdp" not in record and "adam_epsilon" not in record
    again = recipe(tmp_path / "recipe.json", [], {})
    assert again[0] == job and again[1].given == config.given


def test_the_record_holds_no_secret(tmp_path: Path) -> None:
    write_recipe(tmp_path, *made(tmp_path, "hub_token=geheim", "adam_epsilon=1e-6"))
    text = (tmp_path / "recipe.json").read_text()
    assert "geheim" not in text and "adam_epsilon" in text


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("learning_rate=5e-4", "learning_rate was None, now 0.0005"),
        ("data=b.jsonl", r"data was \['a.jsonl'\], now \['b.jsonl'\]"),
        ("objective_options={decay: 0.5}", r"objective_options was \{\}, now \{'decay': 0.5\}"),
        ("adam_epsilon=1e-6", "adam_epsilon was 1e-08, now 1e-06"),
        ("revision=v2", "revision was None, now 'v2'"),
    ],
)
def test_other_settings_are_not_resumed(tmp_path: Path, override: str, what: str) -> None:
    write_recipe(tmp_path, *made(tmp_path))
    with pytest.raises(MismatchError, match=what):
        check_resumable(tmp_path, *made(tmp_path, override))
    write_recipe(tmp_path, *made(tmp_path, override))
    check_resumable(tmp_path, *made(tmp_path, override))
    with pytest.raises(MismatchError):
        check_resumable(tmp_path, *made(tmp_path))


def resumed(tmp_path: Path, before: int, *overrides: str) -> None:
    """Resume, with one process, a run of `before` processes with two conversations each."""
    write_recipe(tmp_path, *made(tmp_path, "per_device_train_batch_size=2"))
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": before}))
    check_resumable(tmp_path, *made(tmp_path, *overrides))


@pytest.mark.parametrize("batch", [(8, 1), (4, 2), (1, 8)])
def test_a_step_may_be_divided_differently_on_resume(tmp_path: Path, batch: tuple[int, int]) -> None:
    size, accumulated = batch
    resumed(tmp_path, 4, f"per_device_train_batch_size={size}", f"gradient_accumulation_steps={accumulated}")


@pytest.mark.parametrize(
    ("before", "overrides", "message"),
    [
        (4, (2, 1), r"4 processes × 2 conversations × 1 batches in a step, not 1 × 2 × 1: give \S+-batch-size 8$"),
        (1, (4, 1), r"1 processes × 2 conversations × 1 batches in a step, not 1 × 4 × 1: give \S+-batch-size 2$"),
        (4, (2, 2), "not 1 × 2 × 2: give --per-device-train-batch-size 4$"),
        (1, (2, 3), "not 1 × 2 × 3: processes × --gradient-accumulation-steps must divide 2$"),
    ],
)
def test_another_number_of_conversations_is_not_resumed(
    tmp_path: Path, before: int, overrides: tuple[int, int], message: str
) -> None:
    size, accumulated = overrides
    with pytest.raises(MismatchError, match=message):
        resumed(tmp_path, before, f"per_device_train_batch_size={size}", f"gradient_accumulation_steps={accumulated}")


def test_a_random_order_is_resumed_with_the_same_division(tmp_path: Path) -> None:
    """The last step of an epoch depends on the division."""
    order = "train_sampling_strategy=random"
    write_recipe(tmp_path, *made(tmp_path, order))
    check_resumable(tmp_path, *made(tmp_path, order))
    with pytest.raises(
        MismatchError, match="gradient_accumulation_steps was 1, now 2; per_device_train_batch_size was 8"
    ):
        divided = ("gradient_accumulation_steps=2", "per_device_train_batch_size=4")
        check_resumable(tmp_path, *made(tmp_path, order, *divided))


def test_a_measured_precision_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16: null is measured once; the run that goes on does not measure again. A given value has precedence."""
    options = ["data=text.jsonl", f"output_dir={tmp_path}"]
    monkeypatch.setattr("vsd.training.config.bfloat16_pays", lambda use_cpu: True)
    job, config = recipe(None, options, {})
    assert config.bf16
    write_recipe(tmp_path, job, config)
    monkeypatch.setattr("vsd.training.config.bfloat16_pays", lambda use_cpu: False)
    again = recipe(None, options, {})
    assert again[1].bf16 and again[1].given["bf16"] is None
    check_resumable(tmp_path, *again)
    assert not recipe(None, [*options, "bf16=false"], {})[1].bf16
    assert not recipe(None, [*options[:1], f"output_dir={tmp_path / 'other'}"], {})[1].bf16


def test_settings_that_may_change_on_resume(tmp_path: Path) -> None:
    write_recipe(tmp_path, *made(tmp_path))
    longer = ["max_steps=9", "num_train_epochs=9", "max_minutes=9", "report_to=none", "logging_steps=1", "device=cpu"]
    check_resumable(tmp_path, *made(tmp_path, *longer, "save_steps=7", "eval_steps=3", "tree=3x2x5", "features=online"))
    check_resumable(tmp_path / "nothing-recorded", *made(tmp_path))
    assert not MAY_CHANGE - {*VSDConfig.__dataclass_fields__, *TrainJob.__dataclass_fields__}


def test_defaults_are_the_same_in_the_whole_package() -> None:
    assert TreeShape.parse(MeasurementOptions().tree) == TreeShape()
    assert EMBEDDED == load.EMBEDDED
    config: dict[str, Any] = VSDConfig(output_dir="unused").given
    for kind in (ObjectiveOptions, OptimisationOptions, MeasurementOptions):
        assert {name: config[name] for name in kind.__dataclass_fields__} == vars(kind())
