"""`vsd demo`: from a released drafter to a better one for the traffic of a service.

The drafter is the one in the package, trained on text of many kinds. The traffic is narrow: word problems of GSM8K
(Cobbe et al., arXiv:2110.14168, MIT licence) with the target's own answers, as a service logs them; `vsd data
regenerate` wrote them. Two runs continue the drafter on these logs for the same time, one with EAGLE-3's objective and
one with VSD's, whose E-step lets the target continue its answers in other ways. Plain decoding and all three drafters
then answer problems that are not in the logs.
"""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from vsd.demo.parts import Text, asked, measure, packaged, train, write
from vsd.drafters import load_drafter
from vsd.drafters.where import EMBEDDED
from vsd.features import FeatureStore
from vsd.files import alone
from vsd.targets import load_target
from vsd.training import DraftDataset

COMMON: dict[str, Any] = {"draft_steps": 5, "learning_rate": 5e-4, "per_device_train_batch_size": 8}
WAYS: dict[str, dict[str, Any]] = {
    "EAGLE-3": {"objective": "eagle3"},
    "VSD": {"objective": "vsd", "objective_options": {"anchors": 32, "length": 8}},
}


def demo(minutes: float, out: Path, seed: int = 0) -> dict[str, Any]:
    """Train for `minutes` in total and measure; returns the content of `out`/results.json. VSD's is `out`/drafter.

    Raises:
        VSDError: the embedded target is not installed, or another run writes to `out`.
    """
    with alone(out):
        return _demo(minutes, out, seed)


def _demo(minutes: float, out: Path, seed: int) -> dict[str, Any]:
    """As `demo`, in a folder that no other run writes to."""
    console, target = Console(), load_target()
    console.print(f"[bold]vsd demo[/bold]: {minutes:g} minutes of training, then the measurement\n")
    examples, held_out = packaged(target, "smollm2-135m-gsm8k.jsonl.gz")
    start = time.perf_counter()
    layers = load_drafter(EMBEDDED, target).needs.layers
    text = Text(DraftDataset(examples), FeatureStore.build(out / "features", target, examples, layers))
    spent = (time.perf_counter() - start) / 60
    way = max(minutes - spent, minutes / 2) / len(WAYS)
    questions = [asked(target, conversation) for conversation in held_out.tuning]
    runs, steps = {"EAGLE-3": out / "eagle3", "VSD": out}, {}
    for name, folder in runs.items():
        console.print(f"the released drafter, continued with {name}'s objective:")
        drafter, options = load_drafter(EMBEDDED, target, trainable=True), {**COMMON, **WAYS[name], "seed": seed}
        steps[name] = train(target, drafter, text, folder, way, options, questions)
    folders = {name: folder / "drafter" for name, folder in runs.items()}
    report = measure(target, {"released": EMBEDDED, **folders}, held_out, seed, console)
    report["training"] = {
        "minutes": minutes,
        "seed": seed,
        "steps": steps,
        "conversations": len(examples),
        "supervised_tokens": len(text.dataset.drafted_tokens()),
    }
    write(report, out, list(runs.values()), ["--minutes", f"{minutes:g}", "--seed", str(seed)], console)
    return report
