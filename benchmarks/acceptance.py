"""Acceptance length τ of drafters and draft trees on whole prompt files, by replay: minutes instead of hours.

    python benchmarks/acceptance.py --drafter D [D2 …] --prompts FILE … [--trees 5x4x16 …] [--temperature T]

The target answers every turn once, by plain decoding in batches; the answers are stored in --answers and read from
there by later runs. Every drafter then drafts along these answers (`vsd.decoding.replay`). All turns are measured;
intervals are 95 % bootstrap intervals over prompts. Trees are depth x top_k x nodes [x p_min [x lookup]]; above
temperature 0 they are verified by rule `target`. --sharpen multiplies the drafter's logits: for a calibrated drafter,
every factor other than 1 reduces τ.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tree_argument import tree
from vsd.allocator import keep_freed_memory
from vsd.data import prompt_inputs
from vsd.decoding import Engine, Replay, Result, Sampling
from vsd.decoding.statistics import acceptance_length, acceptance_per_position
from vsd.drafters import Drafter, load_drafter
from vsd.evaluation import Prompt, load_prompts, write_json
from vsd.evaluation.answers import Answers
from vsd.evaluation.bootstrap import Counts, rate_interval
from vsd.evaluation.breakdown import Passes, by_slice
from vsd.paths import TreeShape
from vsd.progress import track
from vsd.targets import Inputs, Target, load_target

DEFAULT = ("3x3x8", "5x4x16", "7x10x60")
Turn = tuple[int, Inputs, list[int]]  # index of the prompt, the request, token ids of the answer


def plain_answers(
    target: Target, prompts: Sequence[Prompt], max_new_tokens: int, path: Path, temperature: float = 0.0
) -> list[Turn]:
    """Request and answer of every turn; earlier answers of the target are the history of later turns."""
    asked_for = [[str(turn) for turn in p.turns] for p in prompts]
    request = {"turns": asked_for, "max_new_tokens": max_new_tokens, "target": target.fingerprint()}
    if temperature:
        request["temperature"] = temperature
    kept = json.loads(path.read_text()) if path.exists() else None
    recorded = kept["answers"] if kept and kept["request"] == request else None
    engine, answers = Engine(target), recorded or []
    histories = [[{"role": "system", "content": p.system}] if p.system else [] for p in prompts]
    turns: list[Turn] = []
    for number in range(max(len(p.turns) for p in prompts)):
        asked = {}
        for i in (i for i, p in enumerate(prompts) if number < len(p.turns)):
            histories[i].append({"role": "user", "content": prompts[i].turns[number]})
            asked[i] = prompt_inputs(target.tokenizer, histories[i], target.images)
        order = sorted(asked, key=lambda i: len(asked[i].ids))
        for start in track(range(0, len(order), 32), f"answers, turn {number + 1}"):
            batch = order[start : start + 32]
            if recorded is None:
                samplings = [Sampling(max_new_tokens, temperature, seed=i) for i in batch]
                answers += [found.tokens for found in engine.generate([asked[i] for i in batch], samplings)]
            for i in batch:
                tokens = answers[len(turns)]
                turns.append((i, asked[i], tokens))
                text = str(target.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
                histories[i].append({"role": "assistant", "content": text or "…"})
    if recorded is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"request": request, "answers": answers}))
    return turns


def replay_of(target: Target, turns: Sequence[Turn], temperature: float = 0.0) -> Replay:
    """The replay of drafters along the answers of all turns."""
    return Replay(target, [(request, answer) for _, request, answer in turns], temperature)


@contextmanager
def sharpened(drafter: Any, factor: float) -> Iterator[None]:
    """Multiply the drafter's logits by `factor`."""
    hook = drafter.lm_head.register_forward_hook(lambda module, inputs, logits: factor * logits)
    try:
        yield
    finally:
        hook.remove()


def per_prompt(turns: Sequence[Turn], results: Sequence[Result]) -> tuple[Counts, Counts]:
    """(new tokens, passes) of every prompt, each [prompts], summed over its turns."""
    return Answers(prompts=[turn[0] for turn in turns], results=list(results)).per_pass()


def measure(
    replay: Replay, drafter: Drafter, shape: TreeShape, prompts: Sequence[Prompt], turns: Sequence[Turn]
) -> dict[str, Any]:
    """One row of the table."""
    results = replay(drafter, shape)
    answers = Answers(prompts=[turn[0] for turn in turns], results=results)
    return {
        "tree": asdict(shape),
        "tau": acceptance_length(results),
        "tau_ci": rate_interval(*answers.per_pass()),
        "acceptance_per_position": acceptance_per_position(results, shape.depth),
        "slices": by_slice(Passes.of(answers), answers, prompts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--drafter", nargs="+", required=True)
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--trees", nargs="+", type=tree, default=list(map(TreeShape.parse, DEFAULT)))
    parser.add_argument("--limit", type=int, help="prompts of each file; default all")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--sharpen", nargs="+", type=float, default=[1.0])
    parser.add_argument("--answers", type=Path, default=Path("runs/answers.json"), help="file of the answers")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    keep_freed_memory()
    target, prompts = load_target(a.target), load_prompts(a.prompts, a.limit)
    turns = plain_answers(target, prompts, a.max_new_tokens, a.answers, a.temperature)
    replay = replay_of(target, turns, a.temperature)
    title = f"τ at T = {a.temperature:g}, {len(turns)} turns, ≤ {a.max_new_tokens} new tokens, replayed"
    table, rows = Table("drafter", "tree", "τ", "per file", "accepted ≥ 1, 2, …", title=title), []
    for path in a.drafter:
        drafter = load_drafter(path, target)
        for sharpness, shape in track(list(itertools.product(a.sharpen, a.trees)), path):
            with sharpened(drafter, sharpness):
                row = {"drafter": path, "sharpen": sharpness, **measure(replay, drafter, shape, prompts, turns)}
            rows.append(row)
            if a.json:
                write_json({"rows": rows, "prompts": len(prompts), "turns": len(turns)}, a.json)
            low, high = row["tau_ci"]
            table.add_row(
                path,
                str(shape) + (f", logits × {sharpness:g}" if sharpness != 1 else ""),
                f"{row['tau']:.3f} [{low:.3f}, {high:.3f}]",
                ", ".join(f"{name} {found['tau']:.2f}" for name, found in row["slices"]["file"].items()),
                ", ".join(f"{share:.2f}" for share in row["acceptance_per_position"]),
            )
    Console().print(table)


if __name__ == "__main__":
    main()
