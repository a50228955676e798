"""`vsd demo`: train drafters for the embedded target within minutes with two objectives, then measure τ and speed.

EAGLE-3's objective trains a drafter for most of the time. Two runs continue from this drafter, one with `eagle3` and
one with `vsd`, for the same time and on the same text. Plain decoding and both drafters then answer held-out questions.
The target generated the text in `assets/` (`vsd data synthesize`).
"""

import shlex
import time
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from transformers import set_seed

from vsd.data import Conversation, Example, encode, prompt_inputs, read_conversations
from vsd.drafters import draft_vocabulary, load_drafter, new_drafter
from vsd.errors import VSDError
from vsd.evaluation import Contender, Prompt, bench, best, print_table, print_trees, tune, write_json
from vsd.evaluation.tune import SHAPES
from vsd.features import FeatureStore, affordable
from vsd.files import alone
from vsd.report import write_report
from vsd.targets import Inputs, Target, load_target
from vsd.training import DraftDataset, VSDConfig, VSDTrainer
from vsd.training.job import hold_out

HELD_OUT = 16  # questions for the measurement, and the same number for the choice of the tree
ANSWER_TOKENS = 96
DRAFT_VOCABULARY = 4096
DRAFT_STEPS = 3
SMOOTHING = 0.3  # option of cut paths: later draft steps are trained only where decoding is likely to reach them
_FEATURE_SHARE = 0.5  # maximum share of the time; more text is better than a tenth epoch
_START_SHARE = 0.6  # share of the training time with a constant rate; both runs then anneal the rate

START = {
    "objective": "eagle3",
    "ramp": 1.0,  # a third of the time on the first drafted token alone, then two, then three
    "lr_scheduler_type": "constant_with_warmup",
    "objective_options": {"smoothing": SMOOTHING},
}
WAYS = {
    "EAGLE-3": {"objective": "eagle3", "warmup_steps": 0, "objective_options": {"smoothing": SMOOTHING}},
    "VSD": {
        "objective": "vsd",
        "warmup_steps": 0,
        "objective_options": {"arw": True, "car": 0.5, "smoothing": SMOOTHING, "e_step": None},
    },
}  # an E-step helps after many epochs; a demo of minutes does not reach them


class _Text(NamedTuple):
    """Text and features that all trainings of a demo share."""

    dataset: DraftDataset
    store: FeatureStore
    seed: int


def demo(minutes: float, out: Path, seed: int = 0) -> dict[str, Any]:
    """Train for `minutes` in total and measure; returns the content of `out`/results.json. VSD's is `out`/drafter.

    Raises:
        VSDError: too little time, or the embedded target is not installed.
    """
    if minutes < 1:
        raise VSDError("the demo needs a minute at least: --minutes 1")
    with alone(out):
        return _demo(minutes, out, seed)


def _demo(minutes: float, out: Path, seed: int) -> dict[str, Any]:
    """As `demo`, in a folder that no other run writes to."""
    console = Console()
    console.print(f"[bold]vsd demo[/bold]: {minutes:g} minutes of training, then about four of measuring\n")
    target = load_target()
    examples, questions = demo_text(target)
    start = time.perf_counter()
    set_seed(seed)
    used = examples[: affordable(target, examples, _FEATURE_SHARE * 60 * minutes)]
    dataset = DraftDataset(used)
    vocabulary = draft_vocabulary(dataset.drafted_tokens(), target.vocab_size, DRAFT_VOCABULARY)
    drafter = new_drafter(target, vocabulary)
    text = _Text(dataset, FeatureStore.build(out / "features", target, used, drafter.needs.layers), seed)
    spent = (time.perf_counter() - start) / 60
    left = max(minutes - spent, (1 - _FEATURE_SHARE) * minutes)  # feature computation can exceed its estimate
    console.print("a drafter from random weights:")
    steps = {"start": _train(target, drafter, text, _START_SHARE * left, out / "start", START)}
    folders = {"EAGLE-3": out / "eagle3" / "drafter", "VSD": out / "drafter"}
    for name, options in WAYS.items():
        drafter = load_drafter(out / "start" / "drafter", target, trainable=True)
        way = (1 - _START_SHARE) / len(WAYS) * left
        console.print(f"from there with {name}'s objective:")
        steps[name] = _train(target, drafter, text, way, folders[name].parent, options)
    drafters = {name: load_drafter(folder, target) for name, folder in folders.items()}
    shapes = [shape for shape in SHAPES if not shape.lookup]  # compare drafters without prompt lookup
    trees = tune(target, drafters["EAGLE-3"], [texts(target, question) for question in questions[::2]], shapes)
    print_trees(trees, console)
    prompts = [Prompt(c.id, "held-out", None, [c.messages[0]["content"]]) for c in questions[1::2]]
    contenders = [Contender(name, drafter, best(trees).shape) for name, drafter in drafters.items()]
    report = bench(target, contenders, prompts, max_new_tokens=ANSWER_TOKENS, seed=seed)
    report["trees"] = [asdict(tuned) for tuned in trees]
    report["training"] = {
        "minutes": minutes,
        "seed": seed,
        "steps": steps,
        "conversations": len(used),
        "supervised_tokens": len(text.dataset.drafted_tokens()),
        "coverage": vocabulary.coverage,
    }
    report["command"] = f"vsd demo --minutes {minutes:g} --seed {seed} --out {shlex.quote(str(out))}"
    write_json(report, out / "results.json")
    print_table(report, console)
    console.print(f"drafter: {out / 'drafter'}   numbers: {out / 'results.json'}")
    sources = [out / "results.json", out / "start", out / "eagle3", out]
    console.print(f"report: {write_report(sources, out / 'report.html')}")
    return report


def _train(target: Target, drafter: Any, text: _Text, minutes: float, out: Path, options: dict[str, Any]) -> int:
    """Train for `minutes` and save to `out`/drafter; returns the number of steps."""
    config = VSDConfig(
        output_dir=str(out),
        max_minutes=minutes,
        draft_steps=DRAFT_STEPS,
        learning_rate=2e-3,
        per_device_train_batch_size=4,
        save_strategy="no",
        seed=text.seed,
        **options,
    )
    trainer = VSDTrainer(target, drafter, config, text.dataset, features=text.store)
    trainer.train()
    trainer.save_model(str(out / "drafter"))
    trainer.save_state()  # includes the log history
    return trainer.state.global_step


def texts(target: Target, conversation: Conversation) -> tuple[Inputs, list[int]]:
    """Prompt and token ids of the greedy answer."""
    answer = list(conversation.response_ids or [])
    return prompt_inputs(target.tokenizer, conversation.messages[:1]), answer[:ANSWER_TOKENS]


def demo_text(target: Target) -> tuple[list[Example], list[Conversation]]:
    """(training examples, held-out conversations) from the text in the package."""
    with as_file(files("vsd") / "assets" / "smollm2-135m-text.jsonl.gz") as path:
        kept, questions = hold_out(list(read_conversations(path)), 2 * HELD_OUT)
    examples = [
        example
        for conversation in kept
        if len(conversation.response_ids or []) > 1
        for example in encode(target.tokenizer, conversation, max_length=1024)
    ]
    return examples, questions
