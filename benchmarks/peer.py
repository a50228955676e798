"""One EAGLE-3 architecture and one text, trained with speculators (its class, loss and optimiser) and with vsd.

    python benchmarks/peer.py --text FILE --prompts FILE … [--steps 120] [--out runs/peer]

Equal on both sides: draft vocabulary, text, sequences per step, supervised tokens (those that are drafted in serving),
steps, three steps of the training-time test, features computed in advance. By the defaults of each side:
initialisation, loss, optimiser, schedule, precision. The command needs the environment of `make integration`. Each
training runs in a process of its own; memory is the peak beyond the memory in use when training starts. τ is counted
by vLLM, with three drafted tokens a pass, and replayed along the target's greedy answers to the same held-out prompts.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import set_seed

from training_step import peak_mib
from vsd.allocator import keep_freed_memory
from vsd.data import Example, load_examples, prompt_inputs
from vsd.decoding import Engine, Replay, Sampling
from vsd.decoding.statistics import acceptance_length
from vsd.drafters import Drafter, load_drafter, new_drafter
from vsd.drafters.load import read_drafter
from vsd.evaluation import load_prompts, write_json
from vsd.evaluation.bootstrap import rate_interval
from vsd.export import export_drafter
from vsd.features import FeatureStore
from vsd.paths import TreeShape
from vsd.targets import Padded, Target, load_target
from vsd.targets.load import resolve
from vsd.training import DraftDataset, VSDConfig, VSDTrainer
from vsd.training.batch import ByLength

BATCH, DRAFT_STEPS, VOCABULARY = 4, 3, 8192
SHAPES = {"chain of 3": TreeShape.chain(3), "tree 5 × 4, 16": TreeShape(5, 4, 16)}
OBJECTIVES = ("eagle3", "vsd")
NEW_TOKENS = 64
PEER = Path(".venv-vllm/bin/python")
SERVE = Path(__file__).parents[1] / "tests" / "integration" / "serve_in_vllm.py"
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def run_in_peer(*words: object) -> None:
    """Run a script in the environment of speculators and vLLM."""
    subprocess.run([str(PEER), *map(str, words)], env={**os.environ, **OFFLINE}, check=True)


def training_text(target: Target, a: argparse.Namespace) -> Sequence[Example]:
    """The training text of both sides."""
    return load_examples(a.text, target.tokenizer, 384, "skip", lambda line: None)[: a.examples]


def train_with_vsd(objective: str, a: argparse.Namespace) -> None:
    """Train from `out/start`; writes drafter/ and cost.json to `out/OBJECTIVE`. Run in a process of its own."""
    keep_freed_memory()
    target, out = load_target(dtype="float32", device="cpu"), a.out / objective
    examples = training_text(target, a)
    drafter = load_drafter(a.out / "start", target, trainable=True)
    features = FeatureStore.build(a.out / "features", target, examples, drafter.needs.layers)
    config = VSDConfig(
        output_dir=str(out),
        objective=objective,
        max_steps=a.steps,
        draft_steps=DRAFT_STEPS,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = VSDTrainer(target, drafter, config, DraftDataset(examples), features=features)
    before, start = peak_mib(), time.perf_counter()
    trainer.train()
    cost = {"seconds": time.perf_counter() - start, "peak_mib": peak_mib() - before}
    drafter.save_pretrained(out / "drafter")
    (out / "cost.json").write_text(json.dumps(cost))


def train_with_speculators(target: Target, examples: Sequence[Example], start: Drafter, steps: int, out: Path) -> None:
    """Write the data, train with speculators; the checkpoint is `out/trained`, its cost `out/cost.json`."""
    export_drafter(start, target, out / "config", "speculators")
    for number, example in enumerate(examples):
        save_file(sequence(target, example, start.needs.layers), out / f"{number}.safetensors")
    epochs, dataset = range(1 + steps * BATCH // len(examples)), DraftDataset(examples)
    order = [i for epoch in epochs for i in ByLength(BATCH, dataset, lambda epoch=epoch: epoch)]  # type: ignore[misc]
    batches = [order[i * BATCH : (i + 1) * BATCH] for i in range(steps)]
    (out / "batches.json").write_text(json.dumps(batches))
    run_in_peer(Path(__file__).with_name("peer_speculators.py"), out)


@torch.inference_mode()
def sequence(target: Target, example: Example, layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Row t: features at t, token t + 1, final hidden state at t + 1, whether token t + 2 is drafted."""
    text = Padded.of([example.inputs])
    output, drafted = target.features(text, layers), torch.tensor([*example.drafted[2:], False])
    return {
        "aux": output.aux[0, :-1].float().clone(),
        "ids": text.ids[0, 1:].clone(),
        "last": output.hidden[0, 1:].float().clone(),
        "mask": drafted,
    }


def tau_in_vllm(target: Target, checkpoint: Path, prompts: list[list[int]], out: Path) -> float:
    """τ of an exported drafter in vLLM, with three drafted tokens a pass; counts drafts behind the end of an answer."""
    job = {"target": resolve(target.name), "dtype": "float32", "prompts": prompts, "max_new_tokens": NEW_TOKENS}
    speculative = {"method": "eagle3", "model": str(checkpoint), "num_speculative_tokens": 3}
    (out / "job.json").write_text(json.dumps(job | {"speculative": speculative}))
    run_in_peer(SERVE, out / "job.json", out / "served.json")
    found = json.loads((out / "served.json").read_text())
    return 1 + float(found["accepted"]) / float(found["passes"])


def tau_by_replay(drafter: Any, replay: Replay) -> dict[str, Any]:
    """Replayed τ with its interval, for every shape."""
    rows = {}
    for what, shape in SHAPES.items():
        results = replay(drafter.float().eval(), shape)
        new, passes = (np.array([f(r.delivered) for r in results], float) for f in (sum, len))
        rows[what] = {"tau": acceptance_length(results), "ci": rate_interval(new, passes)}
    return rows


def compare(a: argparse.Namespace) -> dict[str, Any]:
    """Train on both sides and measure; returns the content of peer.json."""
    target = load_target(dtype="float32", device="cpu")
    examples = training_text(target, a)
    set_seed(0)
    dataset = DraftDataset(examples)
    start = new_drafter(target, dataset.draft_vocabulary(target.vocab_size, VOCABULARY), "eagle3")
    start.save_pretrained(a.out / "start")
    train_with_speculators(target, examples, start, a.steps, a.out / "speculators")
    for objective in OBJECTIVES:
        subprocess.run([sys.executable, *sys.argv, "--train", objective], check=True)
    prompts = [
        prompt_inputs(target.tokenizer, [{"role": "user", "content": p.turns[0]}]).ids
        for p in load_prompts(a.prompts, a.limit)
    ]
    answers = Engine(target).generate(prompts, Sampling(NEW_TOKENS))
    replay = Replay(target, [(r.prompt, r.tokens) for r in answers])
    report: dict[str, Any] = {
        "steps": a.steps,
        "examples": len(examples),
        "drafted_tokens": dataset.drafted_tokens,
        "runs": {},
    }
    for name in ("speculators", *OBJECTIVES):
        folder = a.out / name
        if name == "speculators":
            drafter, checkpoint = read_drafter(folder / "trained", target), folder / "trained"
        else:
            drafter = read_drafter(folder / "drafter", target)
            checkpoint = export_drafter(drafter, target, folder / "exported", "vllm")
        cost = json.loads((folder / "cost.json").read_text())
        run = {"tau_vllm": tau_in_vllm(target, checkpoint, prompts, folder), **tau_by_replay(drafter, replay), **cost}
        report["runs"][name] = run
        print(name, json.dumps(run), flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="text that the target wrote at temperature 0")
    parser.add_argument("--prompts", nargs="+", required=True, help="prompt files of the measurement")
    parser.add_argument("--limit", type=int, default=24, help="prompts of each file")
    parser.add_argument("--examples", type=int, default=240)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("runs/peer"))
    parser.add_argument("--train", choices=OBJECTIVES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.train:
        train_with_vsd(a.train, a)
        return
    keep_freed_memory()
    write_json(compare(a), a.out / "peer.json")


if __name__ == "__main__":
    main()
