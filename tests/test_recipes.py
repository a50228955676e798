"""Every recipe in `recipes/` is read, and trains the tiny target for one step."""

from pathlib import Path

import pytest

import tiny_run
from vsd import cli
from vsd.drafters.where import drafter_folder
from vsd.targets import Target
from vsd.training.recipe import recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_are_recipes_for_the_common_cases() -> None:
    assert {path.stem for path in RECIPES} == {"finetune-released", "from-scratch", "sampled-serving", "several-gpus"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_read_as_they_are(path: Path) -> None:
    """The comment says how to run it; a drafter that it starts from is in the package."""
    assert f"vsd train --config recipes/{path.name}" in path.read_text()
    job, config = recipe(path, [], {"data": ["text.jsonl"]})
    assert (job.target, config.output_dir) == ("smollm2-135m", job.output_dir)
    assert job.drafter is None or (drafter_folder(job.drafter) / "config.json").exists()
    assert config.max_minutes and config.eval_strategy == "steps"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_train(tiny_target: Target, tmp_path: Path, path: Path) -> None:
    """One step on the tiny target; what the recipe says of objective and batches stays."""
    tiny_run.write_target(tiny_target, tmp_path / "target")
    tiny_run.write_text(tiny_target, tmp_path / "text.jsonl", 10)
    examples = tiny_run.tiny_examples(tiny_target, 10)
    tiny_run.tiny_drafter(tiny_target, examples).save_pretrained(tmp_path / "start")
    words: list[object] = [
        "train",
        "--config",
        path,
        "--target",
        tmp_path / "target",
        "--data",
        tmp_path / "text.jsonl",
    ]
    words += ["--output-dir", tmp_path / "run", "--held-out", 2, "--dtype", "float32"]
    given = recipe(path, [], {"data": ["text.jsonl"]})[0].drafter
    words += ["--drafter", tmp_path / "start"] if given else ["--draft-vocab-size", 64]
    words += ["--set", "max_minutes=null", "max_steps=1", "eval_strategy=no", "save_strategy=no", "report_to=none"]
    words += ["disable_tqdm=true", "use_cpu=true", "bf16=no"]
    assert cli.main([str(word) for word in words]) == 0
    assert (tmp_path / "run" / "drafter" / "model.safetensors").exists()


def test_a_recipe_names_no_option_twice() -> None:
    """YAML takes the last of two values without a word."""
    for path in RECIPES:
        names = [line.split(":")[0] for line in path.read_text().splitlines() if line and line[0].isalpha()]
        assert len(names) == len(set(names)), path
