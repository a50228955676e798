"""`vsd demo`: train a drafter for the embedded target within minutes, then measure what it saves.

The text in `assets/` was written by the target itself (`vsd data synthesize`); the questions measured on are held out.
"""

import time
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from vsd.data import Conversation, Example, encode, prompt_ids, read_conversations
from vsd.drafters import Eagle3Drafter, draft_vocabulary, load_drafter
from vsd.errors import VSDError
from vsd.evaluation import Contender, Prompt, bench, best, print_table, print_trees, tune, write_json
from vsd.targets import Target, load_target
from vsd.training import DraftDataset, FeatureStore, VSDConfig, VSDTrainer
from vsd.training.features import affordable
from vsd.training.job import hold_out

HELD_OUT = 16  # questions to measure on, and as many to choose the tree with
ANSWER_TOKENS = 96
DRAFT_VOCABULARY = 4096
DRAFT_STEPS = 3
RAMP = 1.0  # a third of the time on the first drafted token alone, then two, then three
SMOOTHING = 0.3  # later steps are trained where drafts get so far
_FEATURE_SHARE = 0.5  # of the time: fresh text teaches more than a tenth reading


def demo(minutes: float, out: Path, seed: int = 0) -> dict[str, Any]:
    """Train for `minutes`, measure, write `out`/drafter and `out`/results.json; returns what is in the latter.

    Raises:
        VSDError: too little time, or the embedded target is not installed.
    """
    if minutes < 1:
        raise VSDError("the demo needs a minute at least: --minutes 1")
    console = Console()
    console.print(f"[bold]vsd demo[/bold]: {minutes:g} minutes of training, then about four of measuring\n")
    target = load_target()
    examples, questions = demo_text(target)
    start = time.perf_counter()
    set_seed(seed)
    budget = _FEATURE_SHARE * 60 * minutes
    used = examples[: affordable(target, examples, budget)]
    dataset = DraftDataset(used)
    store = FeatureStore.build(out / "features", target, used)
    vocabulary = draft_vocabulary(dataset.drafted_tokens(), target.vocab_size, DRAFT_VOCABULARY)
    config = VSDConfig(
        output_dir=str(out),
        max_minutes=minutes - (time.perf_counter() - start) / 60,
        draft_steps=DRAFT_STEPS,
        ramp=RAMP,
        objective_options={"smoothing": SMOOTHING},
        learning_rate=2e-3,
        per_device_train_batch_size=4,
        save_strategy="no",
        seed=seed,
    )
    trainer = VSDTrainer(target, Eagle3Drafter.for_target(target, vocabulary), config, dataset, store=store)
    trainer.train()
    trainer.save_model(str(out / "drafter"))
    drafter = load_drafter(out / "drafter", target)
    trees = tune(target, drafter, [texts(target, question) for question in questions[::2]])
    print_trees(trees, console)
    prompts = [Prompt(c.id, "held-out", None, [c.messages[0]["content"]]) for c in questions[1::2]]
    contender = Contender("EAGLE-3", drafter, best(trees).shape)
    report = bench(target, [contender], prompts, max_new_tokens=ANSWER_TOKENS, seed=seed)
    report["trees"] = [asdict(tuned) for tuned in trees]
    report["training"] = {
        "minutes": minutes,
        "seed": seed,
        "steps": trainer.state.global_step,
        "conversations": len(used),
        "supervised_tokens": len(dataset.drafted_tokens()),
        "coverage": vocabulary.coverage,
    }
    write_json(report, out / "results.json")
    print_table(report, console)
    console.print(f"drafter: {out / 'drafter'}   numbers: {out / 'results.json'}")
    return report


def texts(target: Target, conversation: Conversation) -> tuple[list[int], list[int]]:
    """(prompt, greedy answer) token ids."""
    answer = list(conversation.response_ids or [])
    return prompt_ids(target.tokenizer, conversation.messages[:1]), answer[:ANSWER_TOKENS]


def demo_text(target: Target) -> tuple[list[Example], list[Conversation]]:
    """(training examples, held-out conversations) from the text in the package."""
    with as_file(files("vsd") / "assets" / "smollm2-135m-text.jsonl.gz") as path:
        kept, questions = hold_out(list(read_conversations(path)), 2 * HELD_OUT)
    examples = [
        encode(target.tokenizer, conversation, max_length=1024)
        for conversation in kept
        if len(conversation.response_ids or []) > 1
    ]
    return examples, questions
