"""Losslessness on real prompts: every token of speculative decoding at T = 0 against transformers' `generate`.

    python benchmarks/lossless.py --drafter D --prompts FILE … --dtype float32 --out runs/lossless-float32.jsonl

The first turn of each prompt is answered by plain greedy `generate` in batches, then by the engine with a tree and with
a chain, in the same batches; the first prompt of every batch also alone. Short prompts are asked first, so --minutes
leaves out the longest. Answers must be equal, token for token, except at numerical ties: passes of different shapes
round the same logit differently, most of all in bfloat16, so near-ties can have either outcome. The rounding is
measured: the gap between the two best logits at every step of the plain run is compared with the same gap in one plain
pass over the whole text. The largest deviation is the resolution of the precision. An answer that differs from the
plain answer at a step with a larger gap is wrong, and the command fails. Finished prompts are stored in --out: an
interrupted or killed command, or one that --minutes ended, goes on when it is repeated. So thousands of prompts can be
compared in pieces.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vsd.allocator import keep_freed_memory
from vsd.data import prompt_inputs
from vsd.decoding import Engine, Sampling
from vsd.drafters import Drafter, load_drafter
from vsd.errors import ConfigurationError
from vsd.evaluation import Prompt, load_prompts, write_json
from vsd.evaluation.plain import neutral
from vsd.paths import TreeShape
from vsd.progress import track
from vsd.targets import Inputs, Padded, Target, load_target

Record = dict[str, Any]  # of one prompt: the plain answer, the decodings compared with it and their differences
SHAPES = {"tree": TreeShape(2, 3, 6, 0.03, lookup=8), "chain": TreeShape.chain(3)}
DECODINGS = [f"{shape}, {how}" for shape in SHAPES for how in ("alone", "batch")]


class Plain(NamedTuple):
    """A greedy answer; for each of its steps the gap between the two best logits, and the deviation in one pass."""

    tokens: list[int]
    gaps: list[float]
    deviations: list[float]


@torch.inference_mode()
def plain(target: Target, prompts: Sequence[Inputs], max_new_tokens: int) -> list[Plain]:
    """Transformers' `generate` on a left-padded batch, then one pass over each whole text."""
    pad, longest = next(iter(target.eos_ids), 0), max(len(p.ids) for p in prompts)
    ids = torch.tensor([[pad] * (longest - len(p.ids)) + p.ids for p in prompts], device=target.device)
    mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=target.device)
    names = {name for p in prompts for name in p.extras}
    extras = {name: torch.cat([p.extras[name] for p in prompts if p.extras]).to(target.device) for name in names}
    with neutral(target.model):
        output = target.model.generate(
            ids,
            attention_mask=mask,
            **extras,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(target.eos_ids) or None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.stack(output.logits).float().topk(2)  # [T, B, 2]
    return [
        _with_deviations(target, prompt, row[longest:].tolist(), best.values[:, b], best.indices[:, b])
        for b, (prompt, row) in enumerate(zip(prompts, output.sequences))
    ]


def _with_deviations(target: Target, prompt: Inputs, answer: list[int], values: Tensor, indices: Tensor) -> Plain:
    """An answer up to its end-of-sequence token; gaps of its two best logits, compared with those of one pass."""
    end = next((i + 1 for i, token in enumerate(answer) if token in target.eos_ids), len(answer))
    answer = answer[:end]
    text = Padded.of([prompt.followed_by(answer)], target.device)
    hidden = target.features(text).hidden[0, len(prompt.ids) - 1 : -1]
    again = target.logits(hidden).gather(1, indices[:end])
    gaps = values[:end, 0] - values[:end, 1]
    deviations = (gaps - (again[:, 0] - again[:, 1])).abs()
    return Plain(answer, gaps.tolist(), deviations.tolist())


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first different token of two answers; None if they are equal."""
    if list(a) == list(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def compare(target: Target, drafter: Drafter, prompts: Sequence[Inputs], max_new_tokens: int) -> list[Record]:
    """One record for each prompt of a batch."""
    references = plain(target, prompts, max_new_tokens)
    sampling, answers = Sampling(max_new_tokens), {}
    for name, shape in SHAPES.items():
        engine = Engine(target, drafter, shape)
        answers[f"{name}, alone"] = [engine.generate(prompts[:1], sampling)[0].tokens]
        answers[f"{name}, batch"] = [result.tokens for result in engine.generate(prompts, sampling)]
    records = []
    for i, reference in enumerate(references):
        parted = {
            name: first_difference(reference.tokens, tokens[i]) for name, tokens in answers.items() if i < len(tokens)
        }
        differences = {
            decoding: {"at": at, "gap": reference.gaps[at]} for decoding, at in parted.items() if at is not None
        }
        found = {"tokens": len(reference.tokens), "compared": list(parted), "differences": differences}
        records.append({**reference._asdict(), **found})
    return records


def measure(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    request: dict[str, Any],
    out: Path,
    minutes: float = math.inf,
) -> list[Record]:
    """Records of all prompts, or of those that `minutes` suffice for; those in `out` are not computed again."""
    records, end = finished(out, request, len(prompts)), time.monotonic() + 60 * minutes
    messages = [[{"role": "user", "content": p.turns[0]}] for p in prompts]
    asked = [prompt_inputs(target.tokenizer, message, target.images) for message in messages]
    for start in track(range(len(records), len(asked), request["batch"]), "prompts"):
        if time.monotonic() > end:
            break
        done = compare(target, drafter, asked[start : start + request["batch"]], request["max_new_tokens"])
        with out.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in done))
        records += done
    return records


def finished(out: Path, request: dict[str, Any], prompts: int) -> list[Record]:
    """The records in `out`, which is begun if it is not there; a batch that a kill has left incomplete is cut off."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.read_text().splitlines(keepends=True) if out.exists() else []
    whole = lines if not lines or lines[-1].endswith("\n") else lines[:-1]
    if not whole:
        out.write_text(json.dumps(request) + "\n")
        return []
    if json.loads(whole[0]) != request:
        raise ConfigurationError(f"{out} holds a run with other settings: give another --out, or delete the file")
    count = len(whole) - 1
    kept = whole[: 1 + (count if count == prompts else count // request["batch"] * request["batch"])]
    if kept != lines:
        out.write_text("".join(kept))
    return [json.loads(line) for line in kept[1:]]


def report(records: Sequence[Record]) -> dict[str, Any]:
    """For each decoding: answers, those that differ and their gaps; resolution of the precision; gaps of all steps."""
    unresolved = max(max(r["deviations"]) for r in records)
    rows = {}
    for decoding in DECODINGS:
        different = sorted(r["differences"][decoding]["gap"] for r in records if decoding in r["differences"])
        wrong = sum(gap > unresolved for gap in different)
        compared = sum(decoding in r["compared"] for r in records)
        rows[decoding] = {"compared": compared, "different": len(different), "gaps": different, "not_ties": wrong}
    gaps = np.concatenate([r["gaps"] for r in records])
    return {
        "prompts": len(records),
        "tokens": sum(r["tokens"] for r in records),
        "unresolved": unresolved,
        "gap_quantiles": {q: float(np.quantile(gaps, q)) for q in (0.01, 0.1, 0.5)},
        "share_of_steps_unresolved": float(np.mean(gaps <= unresolved)),
        "decodings": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--limit", type=int, help="prompts of each file; default all")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file; resumed if it exists")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end after so many; repeat the command to go on"
    )
    parser.add_argument("--json", type=Path, help="file for the summary")
    a = parser.parse_args()
    keep_freed_memory()
    target = load_target(a.target, dtype=a.dtype)
    prompts = sorted(load_prompts(a.prompts, a.limit), key=lambda prompt: len(str(prompt.turns[0])))  # little padding
    drafter = load_drafter(a.drafter, target)
    request = {"target": target.fingerprint(), "drafter": a.drafter, "dtype": a.dtype, "batch": a.batch}
    request |= {"max_new_tokens": a.max_new_tokens, "prompts": [f"{p.suite} {p.id}" for p in prompts]}
    records = measure(target, drafter, prompts, request, a.out, a.minutes)
    if not records:
        sys.exit("no prompt was finished: give more --minutes")
    found = report(records)
    if a.json:
        write_json({**found, "dtype": a.dtype, "max_new_tokens": a.max_new_tokens}, a.json)
    title = f"{found['prompts']} of {len(prompts)} prompts, {found['tokens']} tokens, {a.dtype}"
    caption = (
        f"Plain passes of different shapes deviate by up to {found['unresolved']:.2g} on the gap between the two best "
        f"logits; {found['share_of_steps_unresolved']:.2%} of all steps have a smaller gap and count as ties."
    )
    columns = ("decoding", "answers", "that differ", "greatest gap there", "not ties")
    table = Table(*columns, title=title, caption=caption)
    for decoding, row in found["decodings"].items():
        counts = (row["compared"], row["different"], f"{max(row['gaps'], default=0):.2g}", row["not_ties"])
        table.add_row(decoding, *map(str, counts))
    Console().print(table)
    wrong = sum(row["not_ties"] for row in found["decodings"].values())
    sys.exit(f"{wrong} answers differ from plain decoding at a step that is not a tie" if wrong else 0)


if __name__ == "__main__":
    main()
