"""The same EAGLE-3 architecture on the same text, trained by speculators' class, loss and optimiser, and by vsd.

    python benchmarks/peer.py --text FILE --prompts FILE … [--steps 120] [--out runs/peer]

Equal: draft vocabulary, text, sequences a step, supervised tokens (those that are drafted when served), steps, three
steps of the training-time test, float32, features computed beforehand. Each side's own: initialisation, loss,
optimiser, schedule, all by its defaults. Needs the environment that `make integration` makes. τ is replayed along the
target's greedy answers to prompts that were not trained on.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import set_seed

from vsd.allocator import keep_freed_memory
from vsd.data import Example, load_examples, prompt_ids
from vsd.decoding import Engine, Replay, Sampling
from vsd.decoding.statistics import acceptance_length
from vsd.drafters import Eagle3Drafter, draft_vocabulary
from vsd.evaluation import load_prompts, write_json
from vsd.evaluation.bootstrap import rate_interval
from vsd.export import export_drafter, import_drafter
from vsd.paths import TreeShape
from vsd.targets import Target, load_target
from vsd.training import DraftDataset, FeatureStore, VSDConfig, VSDTrainer
from vsd.training.batch import ByLength

BATCH, DRAFT_STEPS, VOCABULARY = 4, 3, 8192
SHAPES = {"chain of 3": TreeShape.chain(3), "tree 5 × 4, 16": TreeShape(5, 4, 16)}


def train_ours(target: Target, examples: Sequence[Example], drafter: Eagle3Drafter, steps: int, out: Path) -> float:
    """Train in place; seconds."""
    store = FeatureStore.build(out / "features", target, examples)
    config = VSDConfig(
        output_dir=str(out / "ours"),
        max_steps=steps,
        draft_steps=DRAFT_STEPS,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = VSDTrainer(target, drafter, config, DraftDataset(examples), store=store)
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def train_theirs(target: Target, examples: Sequence[Example], start: Eagle3Drafter, steps: int, out: Path) -> float:
    """Write what they train on, train; seconds. `out/trained` is their checkpoint."""
    export_drafter(start, target, out / "config", "speculators")
    for number, example in enumerate(examples):
        save_file(sequence(target, example), out / f"{number}.safetensors")
    epochs, dataset = range(1 + steps * BATCH // len(examples)), DraftDataset(examples)
    order = [i for epoch in epochs for i in ByLength(BATCH, dataset, lambda epoch=epoch: epoch)]  # type: ignore[misc]
    batches = [order[i * BATCH : (i + 1) * BATCH] for i in range(steps)]
    (out / "batches.json").write_text(json.dumps(batches))
    python, script = Path(".venv-vllm/bin/python"), Path(__file__).with_name("peer_speculators.py")
    subprocess.run([str(python), str(script), str(out)], env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)
    return json.loads((out / "seconds.json").read_text())


@torch.inference_mode()
def sequence(target: Target, example: Example) -> dict[str, torch.Tensor]:
    """Row t: features at t, token t + 1, final state at t + 1, whether token t + 2 is drafted."""
    ids = torch.tensor([example.input_ids])
    output, drafted = target.features(ids), torch.tensor([*example.drafted[2:], False])
    return {
        "aux": output.aux[0, :-1].float().clone(),
        "ids": ids[0, 1:].clone(),
        "last": output.hidden[0, 1:].float().clone(),
        "mask": drafted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="what the target wrote at temperature 0")
    parser.add_argument("--prompts", nargs="+", required=True, help="to measure on")
    parser.add_argument("--limit", type=int, default=24, help="prompts of each file")
    parser.add_argument("--examples", type=int, default=240)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("runs/peer"))
    a = parser.parse_args()
    keep_freed_memory()
    target = load_target(dtype="float32", device="cpu")
    examples = load_examples(a.text, target.tokenizer, 384, "skip", lambda line: None)[: a.examples]
    set_seed(0)
    drafted = DraftDataset(examples).drafted_tokens()
    ours = Eagle3Drafter.for_target(target, draft_vocabulary(drafted, target.vocab_size, VOCABULARY))
    seconds = {"speculators": train_theirs(target, examples, ours, a.steps, a.out)}
    seconds["vsd"] = train_ours(target, examples, ours, a.steps, a.out)
    ours.save_pretrained(a.out / "ours" / "drafter")

    prompts = load_prompts(a.prompts, a.limit)
    ids = [prompt_ids(target.tokenizer, [{"role": "user", "content": p.turns[0]}]) for p in prompts]
    answers = Engine(target).generate(ids, Sampling(64))
    replay = Replay(target, [(r.prompt, r.tokens) for r in answers])
    report: dict[str, object] = {"steps": a.steps, "examples": len(examples), "drafted tokens": len(drafted)}
    for name, drafter in {"speculators": import_drafter(a.out / "trained", target), "vsd": ours}.items():
        for what, shape in SHAPES.items():
            results = replay(drafter.float().eval(), shape)
            new, passes = (np.array([f(r.delivered) for r in results], float) for f in (sum, len))
            low, high = rate_interval(new, passes)
            print(f"{name}, {what}: τ {acceptance_length(results):.3f} [{low:.3f}, {high:.3f}], {seconds[name]:.0f} s")
            report[f"{name}, {what}"] = [acceptance_length(results), low, high]
    write_json({**report, "seconds": seconds}, a.out / "peer.json")


if __name__ == "__main__":
    main()
