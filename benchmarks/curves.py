"""Learning curves as a picture: what trainings logged, against their steps, or their minutes if the clock stopped them.

    python benchmarks/curves.py RUN … --out curves.png [--measure eval_tau]

Every RUN is the output folder of a `vsd train` that has ended.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def curve(run: Path, measure: str) -> tuple[str, list[tuple[float, float]]]:
    """What `run` has logged of `measure`: against what, and (there, value)."""
    log = [entry for entry in json.loads((run / "trainer_state.json").read_text())["log_history"] if measure in entry]
    against = "minutes" if all("minutes" in entry for entry in log) else "step"
    return against, [(entry[against], entry[measure]) for entry in log]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    parser.add_argument("--measure", default="eval_tau", help="eval_tau, loss, accuracy_1, … (default eval_tau)")
    a = parser.parse_args()
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for run in a.runs:
        against, points = curve(run, a.measure)
        axes.plot(*zip(*points), marker=".", label=run.name)
    axes.set(xlabel=against, ylabel=a.measure)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(a.out, dpi=120)


if __name__ == "__main__":
    main()
