"""Learning curves as a picture: what trainings logged, against their steps.

    python benchmarks/curves.py RUN … --out curves.png [--measure eval_tau]

Every RUN is an output folder of `vsd train`; its last checkpoint holds the log.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Curve = list[tuple[int, float]]  # (step, value)


def curve(run: Path, measure: str) -> Curve:
    """What `run` has logged of `measure`."""
    states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not states:
        sys.exit(f"{run} has no checkpoint: train with save_strategy=steps")
    log = json.loads(states[-1].read_text())["log_history"]
    return [(entry["step"], entry[measure]) for entry in log if measure in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    parser.add_argument("--measure", default="eval_tau", help="eval_tau, loss, accuracy_1, … (default eval_tau)")
    a = parser.parse_args()
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for run in a.runs:
        axes.plot(*zip(*curve(run, a.measure)), marker=".", label=run.name)
    axes.set(xlabel="step", ylabel=a.measure)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(a.out, dpi=120)


if __name__ == "__main__":
    main()
