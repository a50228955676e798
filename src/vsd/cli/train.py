"""`vsd train`."""

from dataclasses import dataclass, field
from pathlib import Path

from vsd.cli.parser import Command, Given
from vsd.cli.shared import report_skipped
from vsd.options import (
    DrafterOptions,
    MeasurementOptions,
    ObjectiveOptions,
    OnlineOptions,
    OptimisationOptions,
    TargetOptions,
    TextOptions,
)

EXAMPLES = """\
  vsd train --target T --data text.jsonl --output-dir runs/mine
  vsd train --target T --drafter released --data prompts.jsonl --online --max-minutes 30
  vsd train --config recipe.yaml --learning-rate 5e-4 --set weight_decay=0.01 objective_options.anchors=8
  vsd train --config recipe.yaml --resume
  vsd train --config runs/mine/recipe.json --seed 1 --output-dir runs/again
  torchrun --nproc-per-node 8 --no-python vsd train --config recipe.yaml

A recipe is a YAML file of KEY: VALUE lines. Keys are the options above, with _ for -, and all other fields of
transformers.TrainingArguments. Flags have precedence over --set, --set over the recipe, the recipe over defaults.
OUTPUT_DIR/recipe.json records all of them. The trained drafter is OUTPUT_DIR/drafter;
its training curves: OUTPUT_DIR/report.html, or while it trains tensorboard --logdir OUTPUT_DIR"""

SETTINGS = (
    TargetOptions,
    TextOptions,
    DrafterOptions,
    OnlineOptions,
    ObjectiveOptions,
    OptimisationOptions,
    MeasurementOptions,
)


@dataclass
class Recipe:
    """recipe

    Attributes:
        config: recipe (YAML)
        set: set any option of the recipe; a dotted key, as in objective_options.anchors=8, sets one entry of a mapping
        resume: continue from the last checkpoint in the output folder
    """

    config: Path | None = None
    set: list[str] = field(default_factory=list, metadata={"metavar": "KEY=VALUE"})
    resume: bool = False


def run(given: Given) -> None:
    """Train."""
    from vsd.report import write_report
    from vsd.training.job import end_processes, train
    from vsd.training.recipe import recipe

    a = given.of(Recipe)
    job, config = recipe(a.config, a.set, given.of_fields(*SETTINGS))
    folder = train(job, config, resume=a.resume, report=report_skipped)
    end_processes()
    print(f"drafter: {folder}")
    if config.process_index == 0:
        print(f"report: {write_report([job.output_dir], Path(job.output_dir) / 'report.html')}")


COMMAND = Command("Train a drafter on text that the target wrote.", EXAMPLES, (Recipe, *SETTINGS), run)
