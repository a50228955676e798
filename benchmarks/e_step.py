"""The cost of the E-step: its share of a training step, and the ratio of the whole step to that of the control.

    python benchmarks/e_step.py --drafter D --text FILE [--e-step continued] [--new-states-only]
        [--anchors 16] [--length 16] [--epochs 4]
    python benchmarks/e_step.py --drafter D --text FILE --e-step drafted --anchors 4 [--samples 16] [--every 4]
    python benchmarks/e_step.py --target smollm2-135m-vision --control vispec --drafter D --text FILE …

Steps of the control, `eagle3`, and of `vsd` (rule rejection, with ARW and CAR) are timed alternately on the same
batches, forward and backward; the E-step is timed separately. With `drafted` paths, a round has `every` batches, and
one of them draws paths; with `continued` paths, it has `epochs` passes over four batches, and the first pass draws.
Reported are medians over rounds. Peak memory does not include target, drafter and features.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training_step import peak_mib
from vsd.allocator import keep_freed_memory
from vsd.data import Example, load_examples
from vsd.drafters import load_drafter
from vsd.evaluation import write_json
from vsd.targets import Target, load_target
from vsd.training import DraftDataset, VSDConfig, VSDTrainer
from vsd.training.e_step import Batch


def trainer(target: Target, a: argparse.Namespace, examples: Sequence[Example], **objective: Any) -> VSDTrainer:
    """A trainer for one of the two objectives."""
    config = VSDConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", draft_steps=a.steps, per_device_train_batch_size=4, **objective
    )
    drafter = load_drafter(a.drafter, target, trainable=True)
    return VSDTrainer(target, drafter, config, DraftDataset(examples))


def one_step(trained: VSDTrainer, batch: Batch) -> tuple[float, float]:
    """(seconds of the E-step, seconds of the whole step), without the computation of features."""
    start = time.perf_counter()
    posteriors = trained._e_step(batch)
    middle = time.perf_counter()
    drafter: Any = trained.model
    with torch.autocast(trained.args.device.type, torch.bfloat16, enabled=bool(trained.args.bf16)):
        loss = trained._m_step(drafter, batch, posteriors).loss
    loss.backward()
    drafter.zero_grad()
    return middle - start, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--control", default="eagle3", metavar="OBJECTIVE", help="objective on recorded text")
    parser.add_argument("--e-step", choices=["continued", "drafted"], default="continued")
    parser.add_argument("--new-states-only", action="store_true", help="train on continuations alone")
    defaults = {"anchors": 16, "length": 16, "epochs": 4, "samples": 16, "every": 4, "steps": 6, "rounds": 4}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    keep_freed_memory()
    target = load_target(a.target)
    continued = a.e_step == "continued"
    used = ("anchors", "length", "epochs") if continued else ("anchors", "samples", "every")
    examples = load_examples(a.text, target.tokenizer, 1024, "skip", images=target.images)[
        : 16 if continued else 4 * a.every
    ]
    options = {"rule": "rejection", "arw": True, "car": 0.5, "recorded": not a.new_states_only, "e_step": a.e_step}
    options |= {name: getattr(a, name) for name in used}
    control = trainer(target, a, examples, objective=a.control)
    vsd = trainer(target, a, examples, objective="vsd", objective_options=options)
    batches = [vsd.batch(inputs)._replace(prefill=None) for inputs in vsd.get_train_dataloader()]
    loaded = peak_mib()
    memory = {}
    for name, trained in ((a.control, control), ("vsd", vsd)):  # a peak never falls: the smaller step first
        for batch in batches:
            one_step(trained, batch)
        memory[name] = peak_mib() - loaded
    shares, ratios = [], []
    passes = a.epochs if continued else 1
    for n in range(1, a.rounds + 1):
        seconds = {"E-step": 0.0, "vsd": 0.0, a.control: 0.0}
        for number, batch in enumerate(batches * passes):
            vsd.state.global_step, vsd.state.epoch = number, n * passes + number // len(batches)
            e_step, whole = one_step(vsd, batch)
            seconds["E-step"] += e_step
            seconds["vsd"] += whole
            seconds[a.control] += one_step(control, batch)[1]
        shares.append(seconds["E-step"] / seconds["vsd"])
        ratios.append(seconds["vsd"] / seconds[a.control])
    report = {
        "e_step_share": statistics.median(shares),
        "step_over_control": statistics.median(ratios),
        "peak_mib": memory,
        "rounds": {"shares": shares, "ratios": ratios},
        "settings": {**options, "steps": a.steps},
    }
    print(json.dumps(report, indent=1))
    if a.json:
        write_json(report, a.json)


if __name__ == "__main__":
    main()
