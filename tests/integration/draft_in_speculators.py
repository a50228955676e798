"""Runs in vLLM's environment, not in ours: draft logits of speculators' own EAGLE-3 class.

    python draft_in_speculators.py CHECKPOINT INPUTS.safetensors OUTPUTS.safetensors STEPS

INPUTS: `aux` [1, T, 3h], the target's features, and `ids` [1, T], the tokens behind them. OUTPUTS: `logits`
[STEPS, T, Vd] of drafting along the text, in float32.
"""

import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig


def main(checkpoint: str, inputs: str, outputs: str, steps: str) -> None:
    config = Eagle3SpeculatorConfig.from_pretrained(checkpoint)
    config.transformer_layer_config._attn_implementation = "eager"
    model: Any = Eagle3DraftModel.from_pretrained(checkpoint, config=config, dtype=torch.float32)
    model.load_verifier_weights()
    given = load_file(inputs)
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits[0].contiguous()))
    with torch.inference_mode():
        model.eval()(given["aux"], given["ids"], torch.zeros_like(given["ids"]), ttt_steps=int(steps))
    save_file({"logits": torch.stack(seen).clone()}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
