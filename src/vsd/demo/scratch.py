"""`vsd demo --from-scratch`: drafters from random weights.

EAGLE-3's objective trains a drafter for most of the time. Two runs continue from this drafter, one with `eagle3` and
one with `vsd`, for the same time and on the same text. Plain decoding and both drafters then answer held-out questions.
The target generated the text in the package (`vsd data synthesize`).
"""

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from vsd.demo.parts import Plan, Text, measure, packaged, train_both, write
from vsd.drafters import new_drafter
from vsd.features import FeatureStore, affordable
from vsd.targets import load_target
from vsd.training import DraftDataset

DRAFT_VOCABULARY = 4096
SMOOTHING = 0.3  # option of cut paths: later draft steps are trained only where decoding is likely to reach them
_FEATURE_SHARE = 0.5  # maximum share of the time; more text is better than a tenth epoch

PLAN = Plan(
    common={"draft_steps": 3, "learning_rate": 2e-3, "per_device_train_batch_size": 4},
    start={
        "objective": "eagle3",
        "ramp": 1.0,  # a third of the time on the first drafted token alone, then two, then three
        "lr_scheduler_type": "constant_with_warmup",
        "objective_options": {"smoothing": SMOOTHING},
    },
    ways={
        "EAGLE-3": {"objective": "eagle3", "warmup_steps": 0, "objective_options": {"smoothing": SMOOTHING}},
        "VSD": {
            "objective": "vsd",
            "warmup_steps": 0,
            "objective_options": {"arw": True, "car": 0.5, "smoothing": SMOOTHING, "e_step": None},
        },
    },  # an E-step helps after many epochs; these minutes do not reach them
)


def from_scratch(minutes: float, out: Path, seed: int = 0) -> dict[str, Any]:
    """Train for `minutes` in total and measure; returns the content of `out`/results.json. VSD's is `out`/drafter.

    Raises:
        VSDError: the embedded target is not installed.
    """
    console, target = Console(), load_target()
    console.print(f"[bold]vsd demo --from-scratch[/bold]: {minutes:g} minutes of training, then the measurement\n")
    examples, held_out = packaged(target, "smollm2-135m-text.jsonl.gz")
    start = time.perf_counter()
    set_seed(seed)
    used = examples[: affordable(target, examples, _FEATURE_SHARE * 60 * minutes)]
    dataset = DraftDataset(used)
    vocabulary = dataset.draft_vocabulary(target.vocab_size, DRAFT_VOCABULARY)
    drafter = new_drafter(target, vocabulary)
    text = Text(dataset, FeatureStore.build(out / "features", target, used, drafter.needs.layers))
    spent = (time.perf_counter() - start) / 60
    left = max(minutes - spent, (1 - _FEATURE_SHARE) * minutes)  # feature computation can exceed its estimate
    plan = PLAN._replace(common={**PLAN.common, "seed": seed})
    steps, folders = train_both(target, drafter, text, out, left, plan)
    trained = {name: folders[name] / "drafter" for name in plan.ways}
    report = measure(target, trained, held_out, seed, console)
    settings = {"minutes": minutes, "seed": seed, "steps": steps, "coverage": vocabulary.coverage}
    return write(report, out, list(folders.values()), settings, text, console, "--from-scratch")
