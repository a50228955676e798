"""Time of a training step and of a decoding step in one checkout against another, measured alternately.

    python benchmarks/revisions.py --before FOLDER --after FOLDER --drafter D --prompts FILE … [--rounds N]

Training: a process for each checkout runs the step `vsd` of its own `benchmarks/training_step.py` on the same batches,
in turns. Decoding: `benchmarks/decoding_step.py` of both checkouts, in turns. Prints the ratio after / before: the
median of all turns and its quartiles. For refactorings: the ratio should be 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TREES = ("3x1x4", "5x4x16")
BATCHES = 4
# Version 0.1 names its variants WAYS.
WORKER = f"""
import sys, time
sys.path.insert(0, "benchmarks")
import training_step as t
variant = getattr(t, "VARIANTS", None) or t.WAYS
drafter, target, batches = t.prepare(None, {BATCHES})
t.keep_freed_memory()
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    t.one_step(variant["vsd"], drafter, target, batches[int(line)])
    print(time.perf_counter() - start, flush=True)
"""


def environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout / "src")}


def worker(checkout: Path) -> "subprocess.Popen[str]":
    """A process that runs training steps, once it is ready: two that prepare together would slow each other down."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-c", WORKER]
    process = subprocess.Popen(command, cwd=checkout, env=environment(checkout), text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def training_ratios(before: Path, after: Path, rounds: int) -> list[float]:
    """Of the seconds of single steps on the same batch, one after the other; the order changes every round."""
    workers = [worker(checkout) for checkout in (before, after)]
    ratios = []
    for number in range(rounds + 1):
        seconds = [0.0, 0.0]
        for i in (0, 1) if number % 2 else (1, 0):
            stdin, stdout = workers[i].stdin, workers[i].stdout
            assert stdin is not None and stdout is not None
            print(number % BATCHES, file=stdin, flush=True)
            seconds[i] = float(stdout.readline())
        ratios.append(seconds[1] / seconds[0])
    for process in workers:
        process.communicate("")
    return ratios[1:]  # the first step allocates


def decoding_ms(checkout: Path, drafter: Path, prompts: list[Path], limit: int) -> dict[str, float]:
    """Of a decoding step with each tree."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "numbers.json"
        words = ["--drafter", drafter, "--prompts", *prompts, "--limit", limit, "--trees", *TREES, "--json", out]
        command = [sys.executable, "benchmarks/decoding_step.py", *map(str, words)]
        subprocess.run(command, cwd=checkout, env=environment(checkout), check=True, stdout=subprocess.DEVNULL)
        numbers: dict[str, Any] = json.loads(out.read_text())
    rows = [row["step"] for way, row in numbers["ms"].items() if way != "plain"]  # in the order of TREES
    return dict(zip(TREES, rows))


def show(name: str, ratios: list[float]) -> None:
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    print(f"{name}: {middle:.3f} [{low:.3f}, {high:.3f}], {len(ratios)} turns", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout")
    parser.add_argument("--after", type=Path, required=True, help="checkout")
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=2, help="prompts of each file (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="of decoding (default 3)")
    parser.add_argument("--steps", type=int, default=24, help="training steps of each checkout (default 24)")
    a = parser.parse_args()
    before, after, drafter = a.before.resolve(), a.after.resolve(), a.drafter.resolve()
    prompts = [path.resolve() for path in a.prompts]
    show("training step", training_ratios(before, after, a.steps))
    found: dict[str, list[float]] = {}
    for number in range(a.rounds):
        order = (before, after) if number % 2 else (after, before)
        ms = {folder: decoding_ms(folder, drafter, prompts, a.limit) for folder in order}
        for tree in TREES:
            found.setdefault(f"decoding step, {tree}", []).append(ms[after][tree] / ms[before][tree])
    for name, ratios in found.items():
        show(name, ratios)


if __name__ == "__main__":
    main()
