"""What a training run needs, built in code: text the tiny target wrote itself, a drafter for it, a folder of it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vsd.data import Example, generate_answers, prompt_inputs
from vsd.drafters import new_drafter
from vsd.features import FeatureSource
from vsd.targets import Inputs, Target
from vsd.training import DraftDataset, VSDConfig, VSDTrainer
from vsd.training.job import prompt_of as prompt_of

WORDS = ["hi", "what is", "name", "why", "tell me", "again", "how", "who"]


def tiny_text(target: Target, count: int, max_new_tokens: int = 24) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) tokens of `count` conversations; every answer has at least two tokens."""
    texts = [f"{WORDS[i % len(WORDS)]} {i}" for i in range(2 * count)]
    prompts = [prompt_inputs(target.tokenizer, [{"role": "user", "content": text}]) for text in texts]
    answers = dict(p for batch in generate_answers(target, prompts, max_new_tokens=max_new_tokens) for p in batch)
    kept = [(prompts[i].ids, answers[i].ids) for i in sorted(answers) if len(answers[i].ids) > 1]
    assert len(kept) >= count
    return kept[:count]


def tiny_examples(target: Target, count: int, max_new_tokens: int = 24) -> list[Example]:
    """The same as training sequences."""
    return [
        Example(Inputs(prompt + answer), [False] * (len(prompt) + 1) + [True] * (len(answer) - 1))
        for prompt, answer in tiny_text(target, count, max_new_tokens)
    ]


def tiny_drafter(target: Target, examples: list[Example], size: int = 64, family: str | None = None) -> Any:
    """Randomly initialised, always the same."""
    torch.manual_seed(7)
    return new_drafter(target, DraftDataset(examples).draft_vocabulary(target.vocab_size, size), family)


def tiny_trainer(
    target: Target,
    examples: list[Example],
    folder: Path,
    *,
    features: FeatureSource | None = None,
    eval_prompts: list[Inputs] | None = None,
    family: str | None = None,
    **options: Any,
) -> VSDTrainer:
    """A trainer that keeps quiet and saves nothing; `options` are those of `VSDConfig`."""
    defaults = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False, "draft_steps": 3}
    config = VSDConfig(output_dir=str(folder), **{**defaults, **options})
    drafter = tiny_drafter(target, examples, family=family)
    return VSDTrainer(
        target, drafter, config, DraftDataset(examples), features=features, eval_prompts=eval_prompts or []
    )


def write_target(target: Target, folder: Path) -> None:
    """A folder that `--target` takes."""
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)


def write_text(target: Target, path: Path, count: int, max_new_tokens: int = 24) -> None:
    """A file that `--data` takes."""
    records = [{"prompt_ids": p, "response_ids": a} for p, a in tiny_text(target, count, max_new_tokens)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def torchrun(words: Sequence[object]) -> str:
    """What `vsd` prints when two processes run it, as the documentation says."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--no-python"]
    command = [str(word) for word in (*launcher, Path(sys.executable).with_name("vsd"), *words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
