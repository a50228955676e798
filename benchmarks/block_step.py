"""Time and memory of a DFlash training step: vsd against speculators' own class on the same weights and batch.

    python benchmarks/block_step.py [--batch 4] [--rounds 6] [--attention sdpa eager] [--dtypes float32 bfloat16]
        [--json FILE]

Both run in processes of their own, one step after the other, in float32 and with bfloat16 autocast; speculators 0.9.0
in the environment of `make integration` (.venv-vllm), once with each attention implementation that runs on a CPU. Every
answer token is an anchor on both sides, a block has five mask tokens, the drafter two layers and a draft vocabulary of
8192. A supervised position is a mask token whose label is an answer token. Memory is the peak beyond weights and batch.
The features are given; vsd's, as in a feature store, include the logarithms of the target's normalisers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from training_step import ANSWER, PROMPT, peak_mib
from vsd.allocator import keep_freed_memory
from vsd.drafters import draft_vocabulary, load_drafter, new_drafter
from vsd.evaluation import write_json
from vsd.export import export_drafter
from vsd.objective import HeadTarget, PathTarget, fused_loss, objective
from vsd.paths import Entries, recorded
from vsd.targets import Padded, TargetInfo, load_target_info

K, VD = 5, 8192
LAYERS = (2, 15, 28)
PEER = Path(".venv-vllm/bin/python")
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
TERMS = objective("eagle3", {"decay": 0.78}).parts[0].terms  # exp(-1/4) a step, DFlash's own


def prepare(folder: Path, batch: int) -> None:
    """A random drafter, as speculators reads it, and a batch of random sequences of one length."""
    torch.manual_seed(0)
    target = load_target_info("smollm2-135m", dtype="float32", device="cpu")
    ids = (torch.rand(batch, PROMPT + ANSWER) ** 3 * target.vocab_size).long()
    mask = (torch.arange(PROMPT + ANSWER) > PROMPT).long().expand(batch, -1)  # but for the first token of the answer
    vocabulary = draft_vocabulary(ids, target.vocab_size, VD)
    drafter = new_drafter(target, vocabulary, "dflash", num_hidden_layers=2, aux_layers=LAYERS)
    drafter.config.draft_steps = K
    export_drafter(drafter, target, folder / "checkpoint", "speculators")
    drafter.save_pretrained(folder / "drafter")
    h = target.hidden_size
    features = {"aux": torch.randn(*ids.shape, len(LAYERS) * h), "last": torch.randn(*ids.shape, h)}
    features["normaliser"] = target.log_normaliser(features["last"].flatten(0, 1)).view(ids.shape)
    save_file({"ids": ids, "mask": mask.contiguous(), **features}, folder / "inputs.safetensors")


def run_worker(folder: Path, dtype: torch.dtype) -> None:
    """Steps of vsd, one for every line on the standard input."""
    keep_freed_memory()
    target = load_target_info("smollm2-135m", dtype="float32", device="cpu")
    drafter = load_drafter(folder / "drafter", target, trainable=True).train()
    given = load_file(folder / "inputs.safetensors")
    before = peak_mib()
    for _ in sys.stdin:
        start = time.perf_counter()
        drafter.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss, supervised = step(drafter, target, given)
        loss.backward()
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "supervised": float(supervised), "loss": float(loss.detach())}
        print(json.dumps({**found, "peak_mib": peak_mib() - before}), flush=True)


def step(drafter: Any, target: TargetInfo, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss a supervised position, and their number."""
    ids, mask = given["ids"], given["mask"].bool()
    B, T = ids.shape
    drafted = mask.nonzero()[:, 1].view(B, -1)  # all sequences have as many
    text = Padded(ids, torch.full((B,), T), torch.arange(T).expand(B, -1), ())
    hidden = given["last"].gather(1, (drafted - 1)[..., None].expand(-1, -1, given["last"].shape[-1])).flatten(0, 1)
    vocabulary, normaliser = drafter.vocabulary, given["normaliser"].gather(1, drafted - 1).flatten()
    rows = HeadTarget(hidden, target.head_weight[vocabulary.ids], None, normaliser, lambda x: x)
    paths = recorded(ids, drafted, torch.ones_like(drafted, dtype=torch.bool), K)
    tokens, at, valid = (field.flatten(0, 1).T for field in (paths.tokens, paths.rows, paths.valid))
    labels = PathTarget(vocabulary.rows[tokens], at, valid)
    output = drafter(
        Entries.of(text, given["aux"]),
        paths,
        lambda states, head: fused_loss(states.flatten(1, 2), head, rows, labels, TERMS),
    )
    return output.loss / valid.sum(), valid.sum()


def measure(batch: int, rounds: int, attention: list[str], dtypes: list[str]) -> dict[str, list[dict[str, float]]]:
    """Every step of every side."""
    here = Path(__file__)
    peer = here.with_name("block_step_speculators.py")
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), batch)
        commands: dict[str, list[Any]] = {}
        for dtype in dtypes:
            commands[f"vsd, {dtype}"] = [sys.executable, here, "--worker", name, "--dtype", dtype]
            for kind in attention:
                commands[f"speculators, {kind}, {dtype}"] = [PEER, peer, name, kind, dtype]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        workers = {
            side: subprocess.Popen(list(map(str, words)), env={**os.environ, **OFFLINE}, text=True, **pipes)
            for side, words in commands.items()
        }
        found: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
        for number in range(rounds + 1):
            for side in list(workers) if number % 2 else list(reversed(workers)):
                stdin, stdout = workers[side].stdin, workers[side].stdout
                assert stdin is not None and stdout is not None
                print("go", file=stdin, flush=True)
                found[side].append(json.loads(stdout.readline()))
        for process in workers.values():
            process.communicate("")
    return {side: steps[1:] for side, steps in found.items()}  # the first step allocates


def show(found: dict[str, list[dict[str, float]]]) -> None:
    base = next(side for side in found if side.startswith("speculators"))
    rates = {side: [step["supervised"] / step["seconds"] for step in steps] for side, steps in found.items()}
    table = Table("", "supervised positions/s", f"× {base} (quartiles)", "peak MiB", "supervised", "loss")
    for side, steps in found.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(rates[side], rates[base])], n=4)
        peak = max(step["peak_mib"] for step in steps)
        ratio, last = f"{middle:.2f} ({low:.2f}, {high:.2f})", steps[-1]
        counted = f"{last['supervised']:.0f}"
        table.add_row(
            side, f"{statistics.median(rates[side]):.0f}", ratio, f"{peak:.0f}", counted, f"{last['loss']:.3f}"
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="sequences (default 4)")
    parser.add_argument("--rounds", type=int, default=6, help="steps of each side (default 6)")
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"], help="implementations of speculators")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--worker", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        run_worker(a.worker, getattr(torch, a.dtype))
        return
    found = measure(a.batch, a.rounds, a.attention, a.dtypes)
    show(found)
    if a.json:
        write_json(found, a.json)


if __name__ == "__main__":
    main()
