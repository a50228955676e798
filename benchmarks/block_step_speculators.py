"""The part of `block_step.py` that runs in the environment of speculators: steps of its own DFlash class.

    python benchmarks/block_step_speculators.py FOLDER ATTENTION DTYPE

FOLDER is written by `block_step.py`. For every line on the standard input one forward and backward pass of the batch is
run; a line with seconds, supervised positions, loss and peak MiB beyond weights and batch is printed.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from speculators.losses import resolve_loss_config
from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig


def peak_mib() -> float:
    """Peak resident MiB (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def main(folder: Path, attention: str, dtype: torch.dtype) -> None:
    config = DFlashSpeculatorConfig.from_pretrained(folder / "checkpoint")
    config.transformer_layer_config._attn_implementation = attention
    model: Any = DFlashDraftModel.from_pretrained(folder / "checkpoint", config=config, dtype=torch.float32)
    tensors = load_file(folder / "checkpoint" / "model.safetensors")
    model.load_vocab_mappings(tensors["t2d"], tensors["d2t"])
    model.load_verifier_weights()
    model.verifier_norm = torch.nn.Identity()  # its input is already normed
    given = load_file(folder / "inputs.safetensors")
    B, T = given["ids"].shape
    batch = {
        "hidden_states": given["aux"].flatten(0, 1)[None],
        "input_ids": given["ids"].flatten()[None],
        "document_ids": torch.arange(B).repeat_interleave(T)[None],
        "position_ids": torch.arange(T).repeat(B)[None],
        "loss_mask": given["mask"].flatten()[None],
        "verifier_last_hidden_states": given["last"].flatten(0, 1)[None],
    }
    options = {"loss_config": resolve_loss_config("kl_div", "eager"), "max_anchors": int(given["mask"].sum())}
    model.train()
    before = peak_mib()
    for _ in sys.stdin:
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            _, loss, metrics = model(**batch, **options)
        loss.backward()
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "supervised": float(metrics["full_acc_total"]), "loss": float(loss.detach())}
        print(json.dumps({**found, "peak_mib": peak_mib() - before}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3]))
