"""Memory and minutes of a million conversations: encoded, opened by a second process, and ordered for training.

    python benchmarks/million.py [--conversations 1000000] [--out runs/million]

The conversations are made up, short (about 130 tokens) and all different, in the form that `vsd data regenerate`
writes: messages and token ids. Each phase runs in a process of its own, and is measured by the largest resident memory
of that process and of those that it starts; pages of mapped files count, although the system can drop them.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vsd.data import Examples, training_text
from vsd.evaluation import write_json
from vsd.features.store import Plan
from vsd.targets import load_target_info
from vsd.training import DraftDataset
from vsd.training.batch import ByLength
from vsd.training.job import hold_out

TARGET = "smollm2-135m"
WORDS = ("the", "draft", "target", "token", "path", "tree", "model", "answer", "why", "how", "because", "long", "next")


def write(path: Path, count: int) -> None:
    """A JSONL file of made-up conversations, unless it is there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, half, tokenizer = random.Random(0), path.with_suffix(".part"), load_target_info(TARGET).tokenizer
    ids = {word: tokenizer.encode(f" {word}", add_special_tokens=False) for word in WORDS}
    with half.open("w") as file:
        for number in range(count):
            question, answer = (rng.choices(WORDS, k=k) for k in (40, rng.randint(20, 140)))
            messages = [{"role": "user", "content": f"{number} {' '.join(question)}"}]
            messages.append({"role": "assistant", "content": " ".join(answer)})
            prompt, response = ([i for word in words for i in ids[word]] for words in (question, answer))
            row = {"messages": messages, "prompt_ids": prompt, "response_ids": [*response, tokenizer.eos_token_id]}
            file.write(json.dumps(row) + "\n")
    half.replace(path)


def text(path: Path) -> Examples:
    """The file, encoded or mapped."""
    return training_text([path], load_target_info(TARGET), 2048)


def order(path: Path) -> None:
    """What `vsd train` does before the first step, and the order of one epoch."""
    examples = text(path)
    kept, _ = hold_out(examples, 64, examples.openings)
    dataset = DraftDataset(kept)
    dataset.draft_vocabulary(49152, 8192)
    kept.digest  # noqa: B018
    Plan.of(kept)
    for index in ByLength(8, dataset, lambda: 0):
        dataset[index]


def measured(phase: Callable[[Path], Any], path: Path, found: Any) -> None:
    """Seconds and GB of a phase in this process."""
    start = time.perf_counter()
    phase(path)
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    found.put((time.perf_counter() - start, *(resource.getrusage(kind).ru_maxrss / 2**20 for kind in kinds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=10**6)
    parser.add_argument("--out", type=Path, default=Path("runs/million"))
    a = parser.parse_args()
    os.environ["VSD_CACHE"] = os.environ.get("VSD_CACHE", str(a.out / "cache"))
    path, context = a.out / f"{a.conversations}.jsonl", multiprocessing.get_context("spawn")
    write(path, a.conversations)
    rows = {}
    for name, phase in {"encode": text, "open": text, "open, and order an epoch": order}.items():
        found = context.Queue()
        process = context.Process(target=measured, args=(phase, path, found))
        process.start()
        rows[name] = found.get()
        process.join()
    table = Table("phase", "minutes", "GB", "GB of a process it starts", title=f"{a.conversations} conversations")
    for name, (seconds, own, child) in rows.items():
        table.add_row(name, f"{seconds / 60:.2f}", f"{own:.2f}", f"{child:.2f}")
    Console().print(table)
    write_json({"conversations": a.conversations, "phases": rows}, a.out / f"{a.conversations}.json")


if __name__ == "__main__":
    main()
