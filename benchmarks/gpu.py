"""Correctness and speed on one GPU, in at most eight minutes.

    python benchmarks/gpu.py --out gpu.json [--phases ceilings correct …] [--small]

Every phase runs in a process of its own with a time limit, so one that fails or hangs costs the others nothing; --out
is written after each, and a table comes last. --small takes tiny sizes: the same code on a CPU. Phases:

    ceilings    bytes and operations a second that the device reaches
    correct     the embedded target (or a random one) in float32: answers of trees and chains equal those of `generate`;
                training losses on the device equal those on the CPU, for every family
    training    a step of EAGLE-3's objective for a target of 8 billion parameters: tokens/s by batch size, and the
                operations it needs; memory, host synchronisations, dearest kernels
    e_step      the share of VSD's E-step in a step
    decoding    milliseconds of a pass: plain, chain, trees, and a token of `generate`, against the bytes of the weights
    compiled    the same, compiled with CUDA graphs
    prefill     milliseconds and memory of prompts up to 32 k tokens
    large       one layer of a target of 70 billion parameters: training features and a decoding pass

Random weights have the speed of trained ones, but no acceptance: decoding is timed by pass.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from vsd.data import Example
from vsd.decoding import Engine, Result, Sampling
from vsd.drafters import draft_vocabulary, new_drafter
from vsd.drafters.load import FAMILIES
from vsd.errors import TargetError
from vsd.evaluation import write_json
from vsd.evaluation.plain import neutral
from vsd.features import Features, Texts
from vsd.paths import TreeShape
from vsd.targets import Inputs, Padded, Target, load_target
from vsd.training import Collator, DraftDataset, VSDConfig, VSDTrainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TREES = {"chain of 5": "5", "tree of 16": "5x4x16", "tree of 60": "7x10x60"}


class Size(NamedTuple):
    """Sizes of a target, and of its measurements."""

    vocabulary: int = 128256
    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    draft_vocabulary: int = 32000
    tokens: int = 2048  # of a training text, half of them drafted
    batches: tuple[int, ...] = (1, 2, 4, 8)
    prompts: tuple[int, ...] = (2048, 8192, 32768)
    passes: int = 20
    matrix: int = 8192


EIGHT = Size()
SEVENTY = Size(hidden=8192, intermediate=28672, layers=4, heads=64)
SMALL = Size(128, 32, 64, 4, 4, 2, 64, 32, (1, 2), (32, 64), 3, 256)
LIMITS = {  # seconds
    "ceilings": 30,
    "correct": 90,
    "training": 90,
    "e_step": 50,
    "decoding": 60,
    "compiled": 100,
    "prefill": 30,
    "large": 30,
}


def random_target(size: Size, dtype: torch.dtype, made_on: torch.device = DEVICE) -> Target:
    """A Llama with random weights, made on a device."""
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(size.vocabulary)}, unk_token="<0>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<1>", pad_token="<1>")
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=65536,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    with made_on:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return Target(model, fast, name="random")


def random_drafter(target: Target, size: int, family: str | None = None) -> Any:
    """A drafter with random weights that drafts the first `size` tokens, on the target's device."""
    count = min(size, target.vocab_size)
    torch.manual_seed(0)
    return new_drafter(target, draft_vocabulary(torch.arange(count), target.vocab_size, count), family).to(
        target.device
    )


def random_texts(size: Size, count: int) -> list[Example]:
    """Texts of random tokens; the second half is drafted."""
    generator, half = torch.Generator().manual_seed(0), size.tokens // 2
    ids = torch.randint(2, size.vocabulary, (count, size.tokens), generator=generator).tolist()
    return [Example(Inputs(row), [False] * half + [True] * half) for row in ids]


class RandomFeatures:
    """Features without a target's pass, the same in every step: a step's time is then the drafter's alone."""

    def __init__(self, target: Target, layers: int) -> None:
        self.target, self.width = target, layers * target.hidden_size
        self.kept: Features | None = None

    def batch(self, texts: Texts) -> Features:
        """See `FeatureSource.batch`."""
        if self.kept is None:
            device, h = texts.drafted.device, self.target.hidden_size
            hidden = torch.randn(*texts.drafted.shape, h, device=device)
            normaliser = self.target.log_normaliser(hidden.flatten(0, 1).to(self.target.dtype))
            aux = torch.randn(*texts.inputs.ids.shape, self.width, device=device)
            self.kept = Features(aux, hidden, normaliser.view(texts.drafted.shape))
        return self.kept


def trainer_of(target: Target, drafter: Any, texts: list[Example], random: bool = True, **options: Any) -> VSDTrainer:
    """A trainer on all texts at once, which saves nothing."""
    quiet: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    quiet |= {"use_cpu": target.device.type == "cpu", "per_device_train_batch_size": len(texts)}
    features = RandomFeatures(target, len(drafter.needs.layers)) if random else None
    config = VSDConfig(tempfile.mkdtemp(), **{**quiet, **options})
    return VSDTrainer(target, drafter, config, DraftDataset(texts), features=features)


def collated(trainer: VSDTrainer) -> Any:
    """All texts of a trainer as one batch on its device."""
    dataset: Any = trainer.train_dataset
    return trainer._prepare_inputs(Collator()([dataset[i] for i in range(len(dataset))]))


def one_step(trainer: VSDTrainer, inputs: Any) -> float:
    """The loss; forward and backward pass, without the optimiser's step."""
    trainer.model.zero_grad(set_to_none=True)  # type: ignore[union-attr]
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs)  # type: ignore[arg-type]
    loss.backward()
    return float(loss.detach())


def wait() -> None:
    """For the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a function, after two calls that are not counted."""
    found = []
    for number in range(repeats + 2):
        wait()
        start = time.perf_counter()
        run()
        wait()
        if number > 1:
            found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def peak_gib() -> float | None:
    """Highest allocated memory since the last call; None on a CPU."""
    if DEVICE.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def synchronisations(run: Callable[[], object]) -> int | None:
    """How often a function makes the host wait for the device; None on a CPU."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


def dearest_kernels(run: Callable[[], object], count: int = 10) -> list[tuple[str, float]]:
    """(name, milliseconds) of the operations that take most time on the device."""
    activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        run()
        wait()

    def spent(event: Any) -> float:
        return float(event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total) / 1e3

    events = sorted(found.key_averages(), key=spent, reverse=True)[:count]
    return [(event.key[:80], spent(event)) for event in events]


def ceilings(size: Size) -> dict[str, Any]:
    """TFLOP/s of a bfloat16 product, and GB/s that a copy reads and writes."""
    a, b = (torch.randn(size.matrix, size.matrix, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(size.matrix, size.matrix, 4, device=DEVICE)
    target = torch.empty_like(source)
    product = milliseconds(lambda: torch.mm(a, b), size.passes)
    copy = milliseconds(lambda: target.copy_(source), size.passes)
    return {"tflops": 2e-9 * size.matrix**3 / product, "gbytes": 2e-6 * source.nbytes / copy}


def correct(size: Size) -> dict[str, Any]:
    """Token-identical answers; equal losses on CPU and device."""
    try:
        target = load_target(dtype="float32", device=DEVICE.type, pack=False)
    except TargetError:
        target = random_target(SMALL, torch.float32)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, target.vocab_size, (n,), generator=generator).tolist() for n in range(5, 21)]
    drafter, new = random_drafter(target, 8192), 48
    wanted = [generated(target, prompt, new) for prompt in prompts]
    same = {}
    for name, shape in {"plain": None, **TREES}.items():
        engine = Engine(target, drafter if shape else None, TreeShape.parse(shape) if shape else None)
        found = engine.generate(prompts, Sampling(new))
        same[name] = sum(result.tokens == answer for result, answer in zip(found, wanted)) / len(prompts)
    return {"identical to generate": same, "loss on device / on cpu - 1": loss_differences()}


def generated(target: Target, prompt: list[int], new: int) -> list[int]:
    """The greedy answer of transformers' `generate`."""
    ids, eos = torch.tensor([prompt], device=target.device), list(target.eos_ids)
    ends = {"eos_token_id": eos, "pad_token_id": eos[0]}
    model: Any = target.model
    with neutral(model):
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, **ends)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def loss_differences() -> dict[str, float]:
    """For every family, the relative difference of a training loss on the device and on the CPU, in float32."""
    texts, losses = random_texts(SMALL, 2), dict[str, list[float]]()
    for where in (torch.device("cpu"), DEVICE):
        for family in (name for name in FAMILIES if name != "lm"):
            target = random_target(SMALL, torch.float32, torch.device("cpu"))
            drafter = random_drafter(target, SMALL.draft_vocabulary, family)
            target.model.to(where)
            moved = Target(target.model, target.tokenizer, name="random")
            trainer = trainer_of(moved, drafter.to(where), texts, random=False, bf16=False, draft_steps=3)
            losses.setdefault(family, []).append(one_step(trainer, collated(trainer)))
    return {family: there / here - 1 for family, (here, there) in losses.items()}


def training(size: Size) -> dict[str, Any]:
    """A step of EAGLE-3's objective by batch size; the target has its ends and few layers."""
    target = random_target(size._replace(layers=4), torch.bfloat16)
    rows = {}
    for batch in size.batches:
        drafter = random_drafter(target, size.draft_vocabulary)
        trainer = trainer_of(target, drafter, random_texts(size, batch), bf16=DEVICE.type == "cuda")
        step = partial(one_step, trainer, collated(trainer))
        peak_gib()
        ms = milliseconds(step, 5)
        drafted = batch * (size.tokens // 2)
        rows[str(batch)] = {
            "ms": ms,
            "drafted tokens/s": 1e3 * drafted / ms,
            "tflop": step_tflop(drafter, batch, size),
            "peak gib": peak_gib(),
        }
    found: dict[str, Any] = {"batches": rows}
    found["synchronisations"] = synchronisations(step)
    found["kernels"] = dearest_kernels(step)
    return found


def step_tflop(drafter: Any, batch: int, size: Size, steps: int = 5) -> float:
    """Operations of a step's matrix products, forward and backward, without attention's: the floor."""
    layer = sum(weight.numel() for weight in drafter.midlayer.parameters())
    head, fc, drafted = drafter.lm_head.weight.numel(), drafter.fc.weight.numel(), batch * size.tokens // 2
    return float(6e-12 * (steps * drafted * (layer + head) + batch * size.tokens * fc) + 2e-12 * drafted * head)


def e_step(size: Size) -> dict[str, Any]:
    """Milliseconds of the E-step with new continuations, and of the M-step."""
    target, batch = random_target(size, torch.bfloat16), 2
    drafter = random_drafter(target, size.draft_vocabulary)
    options = {"anchors": 4, "length": 4} if size == SMALL else {}
    choice: dict[str, Any] = {"objective": "vsd", "objective_options": options, "bf16": DEVICE.type == "cuda"}
    trainer = trainer_of(target, drafter, random_texts(size, batch), **choice)
    texts = trainer.batch(collated(trainer))._replace(prefill=None)

    def draw() -> Any:
        for step in trainer._e_steps:
            step.period = -1  # nothing is kept
        return trainer._e_step(texts)

    def fit() -> None:
        with trainer.compute_loss_context_manager():
            loss = trainer._m_step(trainer.model, texts, posteriors).loss  # type: ignore[arg-type]
        loss.backward()

    drawn = milliseconds(draw, 3)
    posteriors = draw()
    return {"e-step ms": drawn, "m-step ms": milliseconds(fit, 3), "peak gib": peak_gib()}


def decoding(size: Size, compiled: bool = False) -> dict[str, Any]:
    """Milliseconds of a pass by part, behind a prompt of 512 tokens."""
    target = random_target(size, torch.bfloat16)
    if compiled:
        modes: dict[str, Any] = {"mode": "reduce-overhead"} if DEVICE.type == "cuda" else {}
        target.compile(**modes)
    drafter = random_drafter(target, size.draft_vocabulary).to(target.dtype)
    drafter.freeze()
    prompt = Inputs(torch.arange(2, 2 + min(512, size.tokens)).remainder(size.vocabulary).tolist())
    weights = sum(weight.numel() * weight.element_size() for weight in target.model.parameters())
    rows: dict[str, Any] = {"weights gb": weights / 1e9}
    for name, shape in {"plain": None, **TREES}.items():
        engine = Engine(target, drafter if shape else None, TreeShape.parse(shape) if shape else None)
        rows[name] = pass_of(engine, prompt, size.passes)
    if not compiled:
        new = size.passes
        rows["generate"] = {"ms": milliseconds(lambda: generated(target, prompt.ids, new), 1) / new}
    return rows


def pass_of(engine: Engine, prompt: Inputs, passes: int) -> dict[str, Any]:
    """Median milliseconds of a pass, its parts, and its synchronisations."""
    stream = engine.stream([Result(prompt)], Sampling(10 * passes, eos_ids=()))
    steps = [next(stream) for _ in range(passes + 6)][6:]  # the first ones compile
    parts = {name: 1e3 * statistics.median(getattr(step, name) for step in steps) for name in PARTS}
    return {"ms": sum(parts.values()), **parts, "synchronisations": synchronisations(lambda: next(stream))}


def prefill(size: Size) -> dict[str, Any]:
    """Milliseconds and memory of reading one prompt."""
    target = random_target(size, torch.bfloat16)
    rows = {}
    for length in size.prompts:
        prompt = Padded.of([Inputs(torch.arange(length).remainder(size.vocabulary).tolist())], DEVICE)
        peak_gib()

        def read(prompt: Padded = prompt, length: int = length) -> None:
            target.prefill(prompt, target.new_cache(1, length + 1), (2,))

        rows[str(length)] = {"ms": milliseconds(read, 3), "peak gib": peak_gib()}
    return rows


def large(size: Size) -> dict[str, Any]:
    """Milliseconds of a layer: of a text's features, and of a pass over a tree of 16."""
    target = random_target(SEVENTY if size != SMALL else SMALL, torch.bfloat16)
    layers = len(target.decoder.layers)
    text = Padded.of([Inputs(torch.arange(size.tokens).remainder(size.vocabulary).tolist())], DEVICE)
    features = milliseconds(lambda: target.features(text, (1,)), 3) / layers
    drafter = random_drafter(target, size.draft_vocabulary).to(target.dtype)
    drafter.freeze()
    engine = Engine(target, drafter, TreeShape.parse(TREES["tree of 16"]))
    verify = pass_of(engine, Inputs([2] * 64), size.passes)["verify"]
    return {"features ms": features, "tree ms": verify / layers, "peak gib": peak_gib()}


PARTS = ("draft", "verify", "commit")
PHASES: dict[str, Callable[[Size], dict[str, Any]]] = {
    "ceilings": ceilings,
    "correct": correct,
    "training": training,
    "e_step": e_step,
    "decoding": decoding,
    "compiled": lambda size: decoding(size, compiled=True),
    "prefill": prefill,
    "large": large,
}


def run_phase(name: str, small: bool) -> dict[str, Any]:
    """The outcome of a phase in a process of its own, or why there is none; and the seconds it took."""
    words = [sys.executable, __file__, "--phase", name, *(["--small"] if small else [])]
    start = time.perf_counter()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMITS[name])
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-2000:]}
    except subprocess.TimeoutExpired:
        found = {"failed": f"took more than {LIMITS[name]} seconds"}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def flat(found: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(name, value) of every number of a nested dictionary."""
    rows = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name}, ")
        elif name == "kernels":
            rows += [(f"{prefix}{kernel}", f"{ms:.2f} ms") for kernel, ms in value]
        else:
            rows.append((f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else str(value)[-300:]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.phase:
        print(json.dumps(PHASES[a.phase](SMALL if a.small else EIGHT)))
        return
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    report: dict[str, Any] = {"device": card, "torch": torch.__version__, "phases": {}}
    for name in a.phases:
        report["phases"][name] = run_phase(name, a.small)
        write_json(report, a.out)
    table = Table("phase", "number", "value", title=f"{card}, torch {torch.__version__}")
    for name, found in report["phases"].items():
        for number, value in flat(found):
            table.add_row(name, number, value)
    Console(width=140).print(table)
    if any("failed" in found for found in report["phases"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
