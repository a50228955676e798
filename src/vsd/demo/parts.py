"""Parts of both demos: text in the package, a timed training, and the measurement with its report."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from vsd.data import Conversation, Example, encode, prompt_inputs, read_conversations
from vsd.drafters import load_drafter
from vsd.evaluation import Contender, Prompt, bench, best, print_table, print_trees, tune, write_json
from vsd.evaluation.tune import SHAPES
from vsd.features import FeatureStore
from vsd.report import write_report
from vsd.targets import Inputs, Target
from vsd.training import DraftDataset, VSDConfig, VSDTrainer
from vsd.training.job import hold_out

HELD_OUT = 16  # questions for the measurement, and the same number for the choice of the tree
ANSWER_TOKENS = 96
START_SHARE = 0.6  # of the training time, with a constant rate; both ways then anneal the rate
TREES = tuple(shape for shape in SHAPES if not shape.lookup)  # drafters are compared without prompt lookup


class Text(NamedTuple):
    """Text and features that all trainings of a demo share."""

    dataset: DraftDataset
    store: FeatureStore


class Plan(NamedTuple):
    """Options of `VSDConfig`: of all trainings, of the first one, and of the two that continue from its drafter."""

    common: dict[str, Any]
    start: dict[str, Any]
    ways: dict[str, dict[str, Any]]  # by name; the last one is the result of the demo


class Measurement(NamedTuple):
    """Held-out conversations: to choose the tree with, and to measure on."""

    tuning: list[Conversation]
    questions: list[Conversation]


def packaged(target: Target, name: str) -> tuple[list[Example], Measurement]:
    """Training examples and held-out conversations of a file in the package that `vsd data` wrote."""
    with as_file(files("vsd") / "assets" / name) as path:
        kept, held_out = hold_out(list(read_conversations(path)), 2 * HELD_OUT)
    examples = [
        example
        for conversation in kept
        if len(conversation.response_ids or []) > 1
        for example in encode(target.tokenizer, conversation, max_length=1024)
    ]
    return examples, Measurement(held_out[::2], held_out[1::2])


def train_both(
    target: Target, drafter: Any, text: Text, out: Path, minutes: float, plan: Plan, asked: Sequence[Inputs] = ()
) -> tuple[dict[str, int], dict[str, Path]]:
    """Train a drafter for a share of `minutes`, then each way from there for the same time.

    Returns:
        Steps and folders of all runs, by name. The last way's folder is `out`.
    """
    folders, way = {"start": out / "start"}, (1 - START_SHARE) * minutes / len(plan.ways)
    print("the first training:")
    started = START_SHARE * minutes
    steps = {"start": train(target, drafter, text, folders["start"], started, plan.common | plan.start, asked)}
    for name, options in plan.ways.items():
        print(f"from there with {name}'s objective:")
        folders[name] = out if name == list(plan.ways)[-1] else out / name.lower()
        drafter = load_drafter(folders["start"] / "drafter", target, trainable=True)
        steps[name] = train(target, drafter, text, folders[name], way, plan.common | options, asked)
    return steps, folders


def train(
    target: Target,
    drafter: Any,
    text: Text,
    out: Path,
    minutes: float,
    options: Mapping[str, Any],
    asked: Sequence[Inputs] = (),
) -> int:
    """Train for `minutes` and save to `out`/drafter; returns the number of steps.

    Args:
        options: of `VSDConfig`.
        asked: prompts to measure τ on, five times during the training; the time is not counted.
    """
    chosen: dict[str, Any] = {"save_strategy": "no", **options}
    if asked:
        chosen |= {"eval_strategy": "steps", "eval_steps": 0.2, "eval_max_new_tokens": ANSWER_TOKENS // 2}
    config = VSDConfig(output_dir=str(out), max_minutes=minutes, **chosen)
    trainer = VSDTrainer(target, drafter, config, text.dataset, features=text.store, eval_prompts=asked)
    trainer.train()
    trainer.save_model(str(out / "drafter"))
    trainer.save_state()  # includes the log history
    return trainer.state.global_step


def measure(
    target: Target, folders: Mapping[str, Path | str], held_out: Measurement, seed: int, console: Console
) -> dict[str, Any]:
    """Choose the tree that is fastest for the first drafter; measure all drafters with it, by name, and print."""
    drafters = {name: load_drafter(folder, target) for name, folder in folders.items()}
    trees = tune(target, next(iter(drafters.values())), [_answered(target, c) for c in held_out.tuning], TREES)
    print_trees(trees, console)
    prompts = [Prompt(c.id, "held-out", None, [c.messages[0]["content"]]) for c in held_out.questions]
    contenders = [Contender(name, drafter, best(trees).shape) for name, drafter in drafters.items()]
    report = bench(target, contenders, prompts, max_new_tokens=ANSWER_TOKENS, seed=seed)
    print_table(report, console)
    return report | {"trees": [asdict(tuned) for tuned in trees]}


def write(
    report: dict[str, Any],
    out: Path,
    runs: Sequence[Path],
    settings: Mapping[str, Any],
    text: Text,
    console: Console,
    *options: str,
) -> dict[str, Any]:
    """Write results.json and report.html about the trainings in `runs`, and name all files; returns the results.

    Args:
        settings: of the trainings, with `minutes` and `seed`.
        options: of the command, beside minutes, seed and folder.
    """
    size = {"conversations": len(text.dataset), "supervised_tokens": text.dataset.drafted_tokens}
    words = [*options, "--minutes", f"{settings['minutes']:g}", "--seed", str(settings["seed"]), "--out", str(out)]
    report = {**report, "training": {**settings, **size}, "command": shlex.join(["vsd", "demo", *words])}
    write_json(report, out / "results.json")
    page = write_report([out / "results.json", *runs], out / "report.html")
    console.print(f"drafter: {out / 'drafter'}   numbers: {out / 'results.json'}\nreport: {page}")
    return report


def asked(target: Target, conversation: Conversation) -> Inputs:
    """The inputs of a conversation's first question."""
    return prompt_inputs(target.tokenizer, conversation.messages[:1])


def _answered(target: Target, conversation: Conversation) -> tuple[Inputs, list[int]]:
    """Prompt and token ids of the greedy answer."""
    return asked(target, conversation), list(conversation.response_ids or [])[:ANSWER_TOKENS]
