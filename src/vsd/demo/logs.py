"""`vsd demo`: from a released drafter to a better one for the traffic of a service.

The drafter is the one in the package, trained on text of many kinds. The traffic is narrow: requests for short e-mails,
with the target's own answers, as a service logs them; `vsd data regenerate` wrote them. EAGLE-3's objective trains the
drafter on the logs until they are nearly exhausted. Two runs go on from there for the same time, one with EAGLE-3's
objective and one with VSD's, whose E-step lets the target continue its answers in other ways. Plain decoding, the
drafter as it was and both results then answer requests that are not in the logs.
"""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from vsd.demo.parts import Plan, Text, asked, measure, packaged, train_both, write
from vsd.drafters import load_drafter
from vsd.drafters.where import EMBEDDED
from vsd.features import FeatureStore
from vsd.targets import load_target
from vsd.training import DraftDataset

PLAN = Plan(
    common={"draft_steps": 5, "learning_rate": 5e-4, "per_device_train_batch_size": 4},
    start={"objective": "eagle3", "lr_scheduler_type": "constant_with_warmup"},
    ways={
        "EAGLE-3": {"objective": "eagle3", "warmup_steps": 0},
        "VSD": {
            "objective": "vsd",
            "warmup_steps": 0,
            "objective_options": {"recorded": False, "anchors": 32, "length": 8},
        },
    },
)


def demo(minutes: float, out: Path, seed: int = 0) -> dict[str, Any]:
    """Train for `minutes` in total and measure; returns the content of `out`/results.json. VSD's is `out`/drafter.

    Raises:
        VSDError: the embedded target is not installed.
    """
    console, target = Console(), load_target()
    console.print(f"[bold]vsd demo[/bold]: {minutes:g} minutes of training, then the measurement\n")
    examples, held_out = packaged(target, "smollm2-135m-mail.jsonl.gz")
    start = time.perf_counter()
    drafter = load_drafter(EMBEDDED, target, trainable=True)
    text = Text(DraftDataset(examples), FeatureStore.build(out / "features", target, examples, drafter.needs.layers))
    spent = (time.perf_counter() - start) / 60
    plan, questions = PLAN._replace(common={**PLAN.common, "seed": seed}), [asked(target, c) for c in held_out.tuning]
    steps, folders = train_both(target, drafter, text, out, max(minutes - spent, minutes / 2), plan, questions)
    trained = {name: folders[name] / "drafter" for name in plan.ways}
    report = measure(target, {"released": EMBEDDED, **trained}, held_out, seed, console)
    settings = {"minutes": minutes, "seed": seed, "steps": steps}
    return write(report, out, list(folders.values()), settings, text, console)
