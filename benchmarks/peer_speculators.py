"""The part of `peer.py` that runs in the environment of speculators: train with its own class, loss and optimiser.

    python benchmarks/peer_speculators.py FOLDER

FOLDER holds `config/`, a speculators checkpoint from which configuration and vocabulary are read; `batches.json`, the
sequence numbers of every step; and NUMBER.safetensors for each sequence: `aux` [T, 3h], `ids` [T], `last` [T, h] after
the final norm, `mask` [T]. The drafter is initialised by `Eagle3DraftModel`, with the target's LM head, which is not
trained. Optimiser (Muon), schedule, clipping, loss and its decay are speculators' defaults; the training loop is ours.
Writes `trained/` and `cost.json`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from speculators.losses import resolve_loss_config
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.train.optimizers import build_optimizers
from speculators.train.trainer import TrainerConfig
from transformers import get_linear_schedule_with_warmup

LR = 1e-3  # default of speculators, for Muon and for AdamW


def new_model(checkpoint: Path) -> Any:
    """Random weights, the target's embeddings and head, the checkpoint's vocabulary."""
    config = Eagle3SpeculatorConfig.from_pretrained(checkpoint)
    config.transformer_layer_config._attn_implementation = "eager"
    torch.manual_seed(0)
    model: Any = Eagle3DraftModel(config)
    tensors = load_file(checkpoint / "model.safetensors")
    model.load_vocab_mappings(tensors["t2d"], tensors["d2t"])
    model.load_verifier_weights()
    model.verifier_norm = torch.nn.Identity()  # its input is already normed
    return model.float()


def joined(folder: Path, numbers: list[int]) -> dict[str, torch.Tensor]:
    """The sequences of a step, concatenated; the keyword arguments of the model."""
    pieces = [load_file(folder / f"{number}.safetensors") for number in numbers]
    whole = {name: torch.cat([piece[name] for piece in pieces])[None] for name in pieces[0]}
    lengths = [len(piece["ids"]) for piece in pieces]
    return {
        "hidden_states": whole["aux"],
        "input_ids": whole["ids"],
        "document_ids": torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None],
        "position_ids": torch.cat([1 + torch.arange(n) for n in lengths])[None],
        "loss_mask": whole["mask"],
        "verifier_last_hidden_states": whole["last"],
    }


def peak_mib() -> float:
    """Peak resident MiB (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def main(folder: Path) -> None:
    model, batches = new_model(folder / "config"), json.loads((folder / "batches.json").read_text())
    config = TrainerConfig(lr=LR, muon_lr=LR, num_epochs=1, save_path="", optimizer="muon")
    optimizers = build_optimizers(model, config)
    schedules = [get_linear_schedule_with_warmup(o, len(batches) // 100, len(batches)) for o in optimizers]
    losses = {"ttt_steps": 3, "ttt_step_loss_decay": 1.0, "loss_config": resolve_loss_config("kl_div", "eager")}
    before, start = peak_mib(), time.perf_counter()
    for step, numbers in enumerate(batches):
        _, loss, _ = model(**joined(folder, numbers), **losses)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool in (*optimizers, *schedules):
            tool.step()
        if step % 20 == 0:
            print(step, float(loss), flush=True)
    cost = {"seconds": time.perf_counter() - start, "peak_mib": peak_mib() - before}
    (folder / "cost.json").write_text(json.dumps(cost))
    model.verifier_norm = torch.nn.Module()
    model.save_pretrained(folder / "trained")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
