"""The time of a decoding step by part: target, LM head and drafter, and the code around these models.

    python benchmarks/decoding_step.py --drafter D --prompts FILE … --trees 3x3x8 5x4x16

One request at a time, T = 0; trees (depth x top_k x nodes [x p_min [x lookup]]) and plain decoding alternate. Inside
the models: the target's decoder, its LM head, the drafter's passes with its LM head. Around the models: `tree`, the
growth of the draft tree; `verify`, masks, positions and the walk along the accepted path; `commit`, moving accepted
rows in the caches; `deliver`, returning tokens. The cost of the timers counts as time around the models.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tree_argument import tree
from vsd.allocator import keep_freed_memory
from vsd.data import prompt_inputs
from vsd.decoding import Engine, Result, Sampling
from vsd.drafters import load_drafter
from vsd.evaluation import load_prompts, write_json
from vsd.evaluation.bench import machine
from vsd.paths import TreeShape
from vsd.progress import track
from vsd.targets import Inputs, Target, load_target

DEFAULT = ("2x3x6", "3x3x8", "5x4x16")
WARM_UP = 3  # steps of every answer that are not counted


class Timers:
    """Seconds inside the models, by part; a wrapper around each model call measures them."""

    def __init__(self, target: Target, drafter: Any) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.wait: Callable[[], object] = torch.cuda.synchronize if target.device.type == "cuda" else lambda: None
        self._watch(target.model.base_model, "forward", "target")
        self._watch(target.model.get_output_embeddings(), "forward", "head")
        for name in ("expand", "log_probs"):
            self._watch(drafter, name, "draft")
        self._watch(drafter, "advance", "advance")

    def _watch(self, owner: Any, name: str, part: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            start = time.perf_counter()
            result = method(*args, **kwargs)
            self.wait()
            self.seconds[part] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)


def profile(engine: Engine, prompt: Inputs, sampling: Sampling, timers: Timers) -> dict[str, float]:
    """Seconds of an answer's steps by part, and the number of `steps`."""
    spent: defaultdict[str, float] = defaultdict(float)
    stream = engine.stream([Result(prompt)], sampling)
    for number in range(sampling.max_new_tokens + 1):
        timers.seconds.clear()
        start = time.perf_counter()
        step = next(stream, None)
        whole = time.perf_counter() - start
        if step is None:
            break
        if number > WARM_UP:
            inside = timers.seconds
            parts = {
                "steps": 1,
                "target": inside["target"],
                "head": inside["head"],
                "drafter": inside["draft"] + inside["advance"],
                "tree": step.draft - inside["draft"],
                "verify": step.verify - inside["target"] - inside["head"],
                "commit": step.commit - inside["advance"],
                "deliver": whole - step.draft - step.verify - step.commit,
            }
            add(spent, parts)
    return spent


def add(sums: defaultdict[str, float], more: dict[str, float]) -> None:
    """Add `more` to `sums`, by part."""
    for part, seconds in more.items():
        sums[part] += seconds


INSIDE, AROUND = ("target", "head", "drafter"), ("tree", "verify", "commit", "deliver")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=4, help="prompts of each file (default 4)")
    parser.add_argument("--trees", nargs="+", type=tree, default=list(map(TreeShape.parse, DEFAULT)))
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    a = parser.parse_args()
    keep_freed_memory()
    target, prompts = load_target(a.target), load_prompts(a.prompts, a.limit)
    drafter = load_drafter(a.drafter, target)
    timers = Timers(target, drafter)
    engines = {"plain": Engine(target)}
    engines |= {str(shape): Engine(target, drafter, shape) for shape in a.trees}
    spent: dict[str, defaultdict[str, float]] = {name: defaultdict(float) for name in engines}
    for prompt in track(prompts, "prompts"):
        inputs = prompt_inputs(target.tokenizer, [{"role": "user", "content": prompt.turns[0]}])
        for name, engine in engines.items():
            add(spent[name], profile(engine, inputs, Sampling(a.max_new_tokens), timers))
    rows = {}
    for name, sums in spent.items():
        ms = {part: 1e3 * sums[part] / sums["steps"] for part in INSIDE + AROUND}
        rows[name] = {**ms, "step": sum(ms.values()), "around": sum(ms[part] for part in AROUND) / sum(ms.values())}
    if a.json:
        write_json({"ms": rows, "machine": machine(target)}, a.json)
    table = Table("decoding", *INSIDE, *AROUND, "step", "around", title="milliseconds per step")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[part]:.2f}" for part in (*INSIDE, *AROUND, "step")), f"{row['around']:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
