"""The training step of vsd against a textbook EAGLE-3 loop in plain PyTorch, with the sizes of SmolLM2-135M.

    python benchmarks/training_step.py [--text FILE] [--rounds N] [--json FILE]

Both train the same drafter on the same batches and the same stored target features; a step consists of the target's
probabilities, forward and backward pass. The textbook loop follows the paper directly: it computes every position of
the padded batch, prompts included; full target logits [B, T, V] and their softmax, restricted to the draft vocabulary;
in each draft step a T × T causal attention over the step-0 keys with one more diagonal, full draft logits [B, T, Vd]
and their log-softmax; and it keeps the graph of all K steps. The command first checks that losses and gradients are
equal in float32. It then times both alternately, each in a process of its own: the textbook loop in plain PyTorch, in
float32 and under bfloat16 autocast, and the step of vsd as `vsd train` runs it, with `keep_freed_memory` and with
bfloat16 if it is faster on this machine.

For whole runs, the last line adds the target's forward pass: EAGLE-3's reference code runs the target in every step,
so the textbook loop pays for it in every epoch; `vsd train` stores the features and pays for it once.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vsd.allocator import keep_freed_memory
from vsd.data import Example, load_examples
from vsd.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from vsd.errors import VSDError
from vsd.evaluation import write_json
from vsd.features import compute_features
from vsd.objective import HeadTarget, PathTarget, fused_loss, objective
from vsd.paths import Entries, recorded
from vsd.targets import Inputs, Padded, load_target
from vsd.training import Collator, DraftDataset
from vsd.training.batch import texts_of
from vsd.training.config import bfloat16_pays

B, V, VD, K, H = 8, 49152, 8192, 5, 576
PROMPT, ANSWER = 60, 200  # mean numbers of tokens of a random conversation
DECAY = 0.8
EPOCHS = (1, 3, 10)
EAGLE3 = objective("eagle3").parts[0].terms


class Batch(NamedTuple):
    """input_ids, labels [B, T]; lengths [B]; drafted, valid [B, Q]; features aux [B, T, 3h], final hidden [B, T, h]."""

    input_ids: Tensor
    lengths: Tensor
    labels: Tensor
    drafted: Tensor
    valid: Tensor
    aux: Tensor
    hidden: Tensor
    log_normaliser: Tensor

    @property
    def text(self) -> Padded:
        """The texts, as models take them."""
        return Padded(self.input_ids, self.lengths, torch.arange(self.input_ids.shape[1]).expand_as(self.input_ids), ())


class Frozen(NamedTuple):
    """The target's embedding and LM head, both [V, h]."""

    embedding: Tensor
    head: Tensor


Step = Callable[[Eagle3Drafter, Frozen, Batch], Tensor]


def vsd_step(drafter: Eagle3Drafter, target: Frozen, batch: Batch) -> Tensor:
    """The computation of `VSDTrainer.compute_loss`."""
    ids, drafted = batch.input_ids, batch.drafted
    before = (drafted - 1)[..., None].expand(-1, -1, H)
    rows = HeadTarget(
        batch.hidden.gather(1, before).flatten(0, 1),
        target.head[drafter.vocabulary.ids],
        None,
        batch.log_normaliser.flatten(),
        lambda logits: logits,
    )
    paths = recorded(ids, drafted, batch.valid, K)
    rows_of, valid = (field.flatten(0, 1).T for field in (paths.rows, paths.valid))
    path_target = PathTarget(torch.full_like(rows_of, -1), rows_of, valid)
    output = drafter(
        Entries.of(batch.text, batch.aux),
        paths,
        lambda hidden, head: fused_loss(hidden.flatten(1, 2), head, rows, path_target, EAGLE3),
    )
    loss: Tensor = output.loss / batch.valid.sum()
    return loss


def textbook_step(drafter: Eagle3Drafter, target: Frozen, batch: Batch) -> Tensor:
    """The same loss, written directly from the paper."""
    layer, attention = drafter.midlayer, drafter.midlayer.self_attn
    B, T = batch.input_ids.shape
    with torch.no_grad():
        p = (batch.hidden @ target.head.T).softmax(-1)[..., drafter.t2d]  # [B, T, Vd], of the token at t + 1
    mask = batch.labels >= 0
    token, answer = batch.input_ids, mask
    hidden = drafter.fc(batch.aux)
    positions = torch.arange(T)[None]
    causal = torch.full((T, T), float("-inf")).triu(1)
    keys, values, loss = [], [], torch.zeros(())
    alive = torch.ones(B, T, dtype=torch.bool)
    for k in range(K):
        token, answer, p = _shifted(token), _shifted(answer), _shifted(p)
        alive = alive & _shifted(answer)
        a = layer.input(F.embedding(token, target.embedding), hidden)
        rotary = drafter.rotary_emb(hidden, positions + k)
        queries = attention.queries(a, rotary)
        key, value = attention.keys_values(a, rotary)
        groups = queries.shape[1] // key.shape[1]
        keys.append(key.repeat_interleave(groups, dim=1))
        values.append(value.repeat_interleave(groups, dim=1))
        scores = queries @ keys[0].transpose(-1, -2) / math.sqrt(queries.shape[-1]) + causal
        own = [(queries * later).sum(-1, keepdim=True) / math.sqrt(queries.shape[-1]) for later in keys[1:]]
        weights = torch.cat([scores, *own], dim=-1).softmax(-1)
        attended = weights[..., :T] @ values[0]
        for i, later in enumerate(values[1:]):
            attended = attended + weights[..., T + i, None] * later
        hidden = layer.finish(hidden, attended)
        log_q = drafter.lm_head(drafter.norm(hidden)).log_softmax(-1)  # [B, T, Vd]
        loss = loss - DECAY**k * ((p * log_q).sum(-1) * alive).sum()
    mean: Tensor = loss / mask.sum()
    return mean


def _shifted(x: Tensor) -> Tensor:
    """x[:, 1:], padded with zeros to its length."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


class Variant(NamedTuple):
    """A step and the options of its run."""

    step: Step
    mixed: bool = False  # under bfloat16 autocast
    checkpointing: bool = False


TEXTBOOK = "textbook"
VARIANTS = {
    TEXTBOOK: Variant(textbook_step),
    "textbook, bfloat16": Variant(textbook_step, mixed=True),
    "vsd": Variant(vsd_step, mixed=bfloat16_pays()),
    "vsd, activation checkpointing": Variant(vsd_step, mixed=bfloat16_pays(), checkpointing=True),
}


def random_examples(count: int) -> list[Example]:
    """Conversations of random tokens, skewed so that a draft vocabulary covers most of them."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(count):
        prompt, answer = (int(n * (0.8 + 0.4 * torch.rand((), generator=generator))) for n in (PROMPT, ANSWER))
        ids = (torch.rand(prompt + answer, generator=generator) ** 3 * V).long().tolist()
        examples.append(Example(Inputs(ids), [False] * (prompt + 1) + [True] * (answer - 1)))
    return examples


def prepare(text: Path | None, batches: int) -> tuple[Eagle3Drafter, Frozen, list[Batch]]:
    """Drafter, target and batches: of the real target if it is installed, else random ones of the same sizes."""
    torch.manual_seed(0)
    try:
        target = load_target(dtype="float32", pack=False)
    except VSDError:
        target = None
    if text is not None and target is not None:
        dataset = DraftDataset(load_examples(text, target.tokenizer, 1024)[: B * batches])
    else:
        dataset = DraftDataset(random_examples(B * batches))
    vocabulary = dataset.draft_vocabulary(V, VD)
    if target is not None:
        drafter = Eagle3Drafter.for_target(target, vocabulary)
        frozen = Frozen(target.embedding_weight.detach().clone(), target.head_weight.detach().clone())
    else:
        drafter = Eagle3Drafter(Eagle3Config(vocab_size=V, draft_vocab_size=VD))
        drafter.d2t.copy_(vocabulary.d2t)
        drafter.t2d.copy_(vocabulary.t2d)
        embedding = torch.randn(V, H) * 0.1
        frozen = Frozen(embedding, embedding.clone())
    drafter.embed = partial(F.embedding, weight=frozen.embedding)
    layers, prepared = drafter.needs.layers, []
    for start in range(0, len(dataset), B):
        items = [dataset[i] for i in range(start, min(start + B, len(dataset)))]
        prepared.append(_batch(Collator()(items), target, frozen, layers))
    return drafter.train(), frozen, prepared


@torch.no_grad()
def _batch(batch: dict[str, Any], target: Any, frozen: Frozen, layers: tuple[int, ...]) -> Batch:
    (text, drafted, valid, _), labels = texts_of(batch), batch["labels"]
    ids = text.ids
    if target is not None:
        output = target.features(text, layers)
        aux, hidden = output.aux.float(), output.hidden.float()
        normaliser = compute_features(target, text, drafted, layers).log_normaliser
    else:
        aux, hidden = torch.randn(*ids.shape, 3 * H), torch.randn(*ids.shape, H)
        before = hidden.gather(1, (drafted - 1)[..., None].expand(-1, -1, H))
        normaliser = torch.stack([(row @ frozen.head.T).logsumexp(-1) for row in before])
    return Batch(ids, text.lengths, labels, drafted, valid, aux, hidden, normaliser)


def one_step(variant: Variant, drafter: Eagle3Drafter, target: Frozen, batch: Batch) -> float:
    """Forward and backward pass; returns the loss."""
    drafter.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=variant.mixed):
        loss = variant.step(drafter, target, batch)
    loss.backward()
    return float(loss.detach())


def check_equal(drafter: Eagle3Drafter, target: Frozen, batch: Batch) -> None:
    """Assert that both steps have the same loss and the same gradient of every weight."""
    gradients: dict[str, list[Tensor]] = {}
    losses = []
    for step in (textbook_step, vsd_step):
        losses.append(one_step(Variant(step), drafter, target, batch))
        for name, weight in drafter.named_parameters():
            assert weight.grad is not None, name
            gradients.setdefault(name, []).append(weight.grad.clone())
    assert math.isclose(*losses, rel_tol=1e-4), losses
    for name, (textbook, ours) in gradients.items():
        error = float((ours - textbook).norm() / textbook.norm())
        assert error < 1e-3, f"gradient of {name} differs by {error:.1e} of its norm"


class Worker:
    """A process that runs one variant, a step at a time."""

    def __init__(self, name: str, folder: Path) -> None:
        words = [sys.executable, __file__, "--worker", name, str(folder)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.peak_mib = self.ask(0)["peak"]

    def ask(self, batch: int) -> dict[str, float]:
        """Seconds of one step, and peak MiB of the process beyond weights and batches."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(batch, file=self.process.stdin, flush=True)
        answer: dict[str, float] = json.loads(self.process.stdout.readline())
        return answer


def run_worker(name: str, folder: Path) -> None:
    """The loop in the process of a `Worker`."""
    variant = VARIANTS[name]
    if variant.step is vsd_step:
        keep_freed_memory()
    inputs = torch.load(folder / "inputs.pt")
    target, batches = Frozen(*inputs[0]), [Batch(*batch) for batch in inputs[1]]
    drafter = Eagle3Drafter.from_pretrained(folder).train()
    drafter.embed = partial(F.embedding, weight=target.embedding)
    if variant.checkpointing:
        drafter.activation_checkpointing_enable()
    before = peak_mib()
    for line in sys.stdin:
        start = time.perf_counter()
        one_step(variant, drafter, target, batches[int(line)])
        print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_mib() - before}), flush=True)


def time_alternately(drafter: Eagle3Drafter, target: Frozen, batches: list[Batch], rounds: int) -> dict[str, Any]:
    """Supervised tokens per second in every round, and peak memory, of every variant; the variants alternate."""
    with tempfile.TemporaryDirectory() as folder:
        drafter.save_pretrained(folder)
        torch.save((tuple(target), [tuple(batch) for batch in batches]), Path(folder) / "inputs.pt")
        workers = {name: Worker(name, Path(folder)) for name in VARIANTS}
        rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for number in range(rounds):
            i = number % len(batches)
            for name in list(VARIANTS) if number % 2 == 0 else list(reversed(VARIANTS)):
                rates[name].append(int(batches[i].valid.sum()) / workers[name].ask(i)["seconds"])
        for worker in workers.values():
            worker.process.communicate("")
    return {"rates": rates, "peak_mib": {name: worker.peak_mib for name, worker in workers.items()}}


def peak_mib() -> float:
    """Peak resident MiB. Not ru_maxrss on Linux: a process inherits the value of its parent."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    except (FileNotFoundError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(text: Path | None, rounds: int) -> dict[str, Any]:
    """All measurements; the content of --json."""
    drafter, target, batches = prepare(text, min(rounds, 4))
    check_equal(drafter, target, batches[0])
    found = time_alternately(drafter, target, batches, rounds)
    textbook = found["rates"][TEXTBOOK], found["peak_mib"][TEXTBOOK]
    report: dict[str, Any] = {
        "steps": {
            name: {
                "tokens_per_second": statistics.median(rates),
                "throughput_ratio": _spread([rate / base for rate, base in zip(rates, textbook[0])]),
                "peak_mib": found["peak_mib"][name],
                "memory_ratio": found["peak_mib"][name] / textbook[1],
            }
            for name, rates in found["rates"].items()
        },
        "settings": {
            "rounds": rounds,
            "batch": list(batches[0].input_ids.shape),
            "supervised": int(batches[0].valid.sum()),
            "draft_steps": K,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "bfloat16_pays": bfloat16_pays(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
    }
    seconds = target_seconds(batches, rounds, drafter.needs.layers)
    if seconds is not None:
        report["target_seconds"] = seconds
        report["run_ratio"] = whole_runs(report, seconds, report["settings"]["supervised"])
    return report


def target_seconds(batches: list[Batch], rounds: int, layers: tuple[int, ...]) -> dict[str, float] | None:
    """Median seconds of the target's pass over a batch: with all hidden states (textbook), and with features only."""
    try:
        plain, ours = load_target(dtype="float32", pack=False), load_target(dtype="float32")
    except VSDError:
        return None
    seconds: dict[str, list[float]] = {"textbook": [], "vsd": []}
    for number in range(rounds):
        batch = batches[number % len(batches)]
        start = time.perf_counter()
        with torch.no_grad():
            plain.model.base_model(input_ids=batch.input_ids, output_hidden_states=True)
        middle = time.perf_counter()
        compute_features(ours, batch.text, batch.drafted, layers)
        seconds["textbook"].append(middle - start)
        seconds["vsd"].append(time.perf_counter() - middle)
    return {name: statistics.median(values) for name, values in seconds.items()}


def whole_runs(report: dict[str, Any], target: dict[str, float], supervised: int) -> dict[int, float]:
    """By number of epochs: seconds of a textbook run over seconds of a vsd run, the target's passes included."""
    step = {name: supervised / report["steps"][name]["tokens_per_second"] for name in ("textbook", "vsd")}
    return {E: (step["textbook"] + target["textbook"]) / (step["vsd"] + target["vsd"] / E) for E in EPOCHS}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(report: dict[str, Any]) -> None:
    settings = report["settings"]
    table = Table(title=f"One EAGLE-3 training step, {settings['batch']} tokens, {settings['supervised']} supervised")
    for column in ("", "supervised tokens/s", "× textbook (min, max)", "peak MiB", "× textbook"):
        table.add_column(column, justify="right" if column else "left")
    for name, step in report["steps"].items():
        ratio = step["throughput_ratio"]
        table.add_row(
            name,
            f"{step['tokens_per_second']:.0f}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f}, {ratio['max']:.2f})",
            f"{step['peak_mib']:.0f}",
            f"{step['memory_ratio']:.2f}",
        )
    Console().print(table)
    if "run_ratio" in report:
        ratios = ", ".join(f"{ratio:.2f} × in {E} epochs" for E, ratio in report["run_ratio"].items())
        Console().print(f"whole runs, with the target in every epoch (textbook) and in the first (vsd): {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="JSONL written by the target (default: random tokens)")
    parser.add_argument("--rounds", type=int, default=6, help="default 6")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--worker", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if a.worker:
        run_worker(a.worker[0], Path(a.worker[1]))
        return
    report = measure(a.text, a.rounds)
    show(report)
    if a.json:
        write_json(report, a.json)


if __name__ == "__main__":
    main()
