"""Time of a training step and of a decoding step in one checkout against another, measured alternately.

    python benchmarks/revisions.py --before FOLDER --after FOLDER --drafter D --prompts FILE … [--rounds N]

Runs `benchmarks/training_step.py` and `benchmarks/decoding_step.py` of both checkouts in turns, each in a process of
its own with its own `src`, and prints the ratio after / before of every round. For refactorings: the ratio should be 1.
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


def run(checkout: Path, *words: object) -> dict[str, Any]:
    """The numbers of one benchmark of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "numbers.json"
        command = [sys.executable, *map(str, words), "--json", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
        numbers: dict[str, Any] = json.loads(out.read_text())
    return numbers


def seconds(checkout: Path, drafter: Path, prompts: list[Path], limit: int) -> dict[str, float]:
    """Of a supervised token in training, and of a decoding step with each tree."""
    training = run(checkout, "benchmarks/training_step.py", "--rounds", 2)
    words = ["--drafter", drafter, "--prompts", *prompts, "--limit", limit, "--trees", *TREES]
    decoding = run(checkout, "benchmarks/decoding_step.py", *words)
    rows = [row["step"] for way, row in decoding["ms"].items() if way != "plain"]  # in the order of TREES
    found = {f"decoding step, {tree}": ms / 1e3 for tree, ms in zip(TREES, rows)}
    return {"training step": 1 / training["steps"]["vsd"]["tokens_per_second"], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout")
    parser.add_argument("--after", type=Path, required=True, help="checkout")
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=2, help="prompts of each file (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    a = parser.parse_args()
    drafter, prompts = a.drafter.resolve(), [path.resolve() for path in a.prompts]
    ratios: dict[str, list[float]] = {}
    for number in range(a.rounds):
        order = [a.before.resolve(), a.after.resolve()]
        found = {folder: seconds(folder, drafter, prompts, a.limit) for folder in order[:: 1 if number % 2 else -1]}
        before, after = (found[folder] for folder in order)
        for name in before:
            ratios.setdefault(name, []).append(after[name] / before[name])
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")


if __name__ == "__main__":
    main()
