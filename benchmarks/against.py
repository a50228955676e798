"""vsd's decoder against transformers and vLLM: the same weights, precision and prompts, in one run.

    python benchmarks/against.py --drafter D --prompts FILE … --tree 3x3x8 [--vllm .venv-vllm/bin/python --k 3]

Measured are: `generate` of an unmodified transformers model (plain, with prompt lookup, with an assistant model); vsd
without and with a drafter; vLLM in a separate process and environment, without and with the same drafter, exported. All
decoders answer each request one after another, in rotating order, one request at a time, T = 0. Intervals are 95 %
paired bootstrap intervals over prompts. The default target's family has no smaller model, so the assistant consists of
the target's first layers and its LM head: an assistant that needs no training.
"""

import argparse
import copy
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from tree_argument import tree
from vsd.allocator import keep_freed_memory
from vsd.data import prompt_inputs
from vsd.decoding import Engine, Sampling
from vsd.drafters import load_drafter
from vsd.drafters.load import family_for, read_drafter
from vsd.evaluation import load_prompts, write_json
from vsd.evaluation.bench import machine
from vsd.evaluation.bootstrap import pooled_rate, ratio_interval
from vsd.evaluation.plain import neutral
from vsd.export import export_drafter
from vsd.paths import TreeShape
from vsd.progress import track
from vsd.targets import Target, load_target
from vsd.targets.load import resolve

Decoder = Callable[[list[int]], tuple[list[int], float]]  # prompt -> (answer, seconds)
BASE = "generate"
ASSISTANT_LAYERS = 4
LOOKUP = 3  # tokens that prompt lookup proposes


def timed(answer: Callable[[list[int]], list[int]]) -> Decoder:
    """A decoder that measures the seconds of `answer`."""

    def decode(prompt: list[int]) -> tuple[list[int], float]:
        start = time.perf_counter()
        tokens = answer(prompt)
        return tokens, time.perf_counter() - start

    return decode


def transformers_decoder(model: Any, length: int, **options: Any) -> Decoder:
    """Transformers' `generate`, greedy."""

    def answer(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt], device=model.device)
        mask, eos = torch.ones_like(ids), model.generation_config.eos_token_id
        ends = {"eos_token_id": eos, "pad_token_id": eos, "max_new_tokens": length}
        with neutral(model):
            output = model.generate(ids, attention_mask=mask, do_sample=False, **ends, **options)
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    return timed(answer)


def first_layers(model: Any, layers: int) -> Any:
    """A copy of the model with its first decoder layers only."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    cut = type(model)(config).to(model.dtype).to(model.device)
    cut.load_state_dict(model.state_dict(), strict=False)
    cut.generation_config = copy.deepcopy(model.generation_config)
    return cut.eval()


def vsd_decoder(engine: Engine, length: int) -> Decoder:
    """vsd's engine, greedy."""
    return timed(lambda prompt: engine.generate([prompt], Sampling(length))[0].tokens)


class VLLMDecoder:
    """vLLM in a separate process; requests and answers are lines of JSON."""

    def __init__(self, python: Path, job: dict[str, Any], log: Path) -> None:
        script = Path(__file__).with_name("against_vllm.py")
        self.process = subprocess.Popen(
            [python, script, json.dumps(job)],
            env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def __call__(self, prompt: list[int]) -> tuple[list[int], float]:
        """The answer and its seconds, measured in vLLM's process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(prompt) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("the vLLM process ended: read its log in the --out folder")
        answer = json.loads(line)
        return answer["tokens"], answer["seconds"]


def all_decoders(target: Target, a: argparse.Namespace) -> dict[str, Decoder]:
    """All decoders by name."""
    length = a.max_new_tokens
    source = resolve(target.name)
    stock: Any = AutoModelForCausalLM.from_pretrained(source, dtype=target.model.dtype).eval().to(target.device)
    drafter = load_drafter(a.drafter, target)
    decoders = {
        BASE: transformers_decoder(stock, length),
        "generate, prompt lookup": transformers_decoder(stock, length, prompt_lookup_num_tokens=LOOKUP),
        f"generate, assistant of {ASSISTANT_LAYERS} layers": transformers_decoder(
            stock, length, assistant_model=first_layers(stock, ASSISTANT_LAYERS)
        ),
        "vsd, plain": vsd_decoder(Engine(target), length),
    }
    for count in {shape.lookup for shape in a.tree} - {0}:
        engine = Engine(target, None, TreeShape(lookup=count))
        decoders[f"vsd, {count} looked up, no drafter"] = vsd_decoder(engine, length)
    decoders |= {f"vsd, {shape}": vsd_decoder(Engine(target, drafter, shape), length) for shape in a.tree}
    if a.vllm:
        a.out.mkdir(parents=True, exist_ok=True)
        job = {"target": source, "dtype": str(target.model.dtype).removeprefix("torch."), "max_new_tokens": length}
        exported = a.out / "exported"
        if not exported.exists():
            export_drafter(read_drafter(a.drafter, target), target, exported, "vllm")
        decoders["vLLM, plain"] = VLLMDecoder(a.vllm, job, a.out / "vllm-plain.log")
        _, options = shlex.split(family_for(drafter).serve("vllm", str(exported), a.k))
        with_drafter = job | {"speculative": json.loads(options)}
        decoders[f"vLLM, chain of {a.k}"] = VLLMDecoder(a.vllm, with_drafter, a.out / "vllm-chain.log")
    return decoders


def measure(decoders: dict[str, Decoder], prompts: Sequence[list[int]]) -> dict[str, dict[str, Any]]:
    """Of each decoder: tokens per second, ratios to `generate` and to plain vsd, share of answers as `generate`'s."""
    names = list(decoders)
    tokens: dict[str, list[list[int]]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        decoders[name](prompts[0])  # warm-up
    for n, prompt in enumerate(track(prompts, "prompts")):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            answer, spent = decoders[name](prompt)
            tokens[name].append(answer)
            seconds[name].append(spent)
    rate = {name: (np.array([len(t) for t in tokens[name]], float), np.array(seconds[name])) for name in names}
    return {
        name: {
            "tokens_per_second": pooled_rate(*rate[name]),
            "over_generate": pooled_rate(*rate[name]) / pooled_rate(*rate[BASE]),
            "over_generate_ci": ratio_interval(*rate[name], *rate[BASE]),
            "over_plain": pooled_rate(*rate[name]) / pooled_rate(*rate["vsd, plain"]),
            "over_plain_ci": ratio_interval(*rate[name], *rate["vsd, plain"]),
            "same_answers": float(np.mean([x == y for x, y in zip(tokens[name], tokens[BASE])])),
        }
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=20, help="prompts of each file (default 20)")
    parser.add_argument(
        "--tree", type=tree, nargs="+", required=True, help="depth x top_k x nodes [x p_min [x lookup]]"
    )
    parser.add_argument("--vllm", type=Path, help="Python executable of an environment with vLLM")
    parser.add_argument("--k", type=int, default=3, help="tokens that vLLM drafts in a pass (default 3)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/against"))
    a = parser.parse_args()
    keep_freed_memory()
    target, prompts = load_target(a.target), load_prompts(a.prompts, a.limit)
    ids = [prompt_inputs(target.tokenizer, [{"role": "user", "content": p.turns[0]}]).ids for p in prompts]
    rows = measure(all_decoders(target, a), ids)
    write_json({"rows": rows, "prompts": len(ids), "machine": machine(target)}, a.out / "against.json")
    table = Table(
        "decoding", "tokens/s", "× generate", "× vsd plain", "answers equal to generate's", title=f"{len(ids)} prompts"
    )
    for name, row in rows.items():
        over = [
            f"{row[what]:.2f} [{row[f'{what}_ci'][0]:.2f}, {row[f'{what}_ci'][1]:.2f}]"
            for what in ("over_generate", "over_plain")
        ]
        table.add_row(name, f"{row['tokens_per_second']:.1f}", *over, f"{row['same_answers']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
