"""Plot learning curves: a logged measure against minutes for runs with a time budget, against steps for others.

    python benchmarks/curves.py RUN … --out curves.png [--measure eval_tau]

Every RUN is the output folder of a finished `vsd train`.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def logged(run: Path, measure: str) -> list[dict[str, float]]:
    """The log entries of `run` that hold `measure`."""
    log = [entry for entry in json.loads((run / "trainer_state.json").read_text())["log_history"] if measure in entry]
    return log or sys.exit(f"{run} has no {measure}: give another --measure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="image file, .png or .svg")
    parser.add_argument("--measure", default="eval_tau", help="eval_tau, loss, accuracy_1, … (default eval_tau)")
    a = parser.parse_args()
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    logs = {run.name: logged(run, a.measure) for run in a.runs}
    against = "minutes" if all("minutes" in entry for log in logs.values() for entry in log) else "step"
    for name, log in logs.items():
        axes.plot([entry[against] for entry in log], [entry[a.measure] for entry in log], marker=".", label=name)
    axes.set(xlabel=against, ylabel=a.measure)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(a.out, dpi=120)


if __name__ == "__main__":
    main()
