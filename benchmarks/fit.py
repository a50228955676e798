"""What a drafter knows: how often it proposes the text's own next token, on text it has read and on text it has not.

    python benchmarks/fit.py --drafter D [D2 …] --text FILE [FILE …] [--prompts FILE …] [--sample 64]

Every position of the answers, K steps ahead along the answer itself: share of tokens that are the drafter's first, and
among its first four. Of each text a random sample of conversations; --prompts have the target answer them first.
"""

import argparse
import random
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from acceptance import plain_answers
from vsd.allocator import keep_freed_memory
from vsd.data import Example, load_examples
from vsd.drafters import Eagle3Drafter
from vsd.evaluation import load_prompts
from vsd.paths import consumed, recorded
from vsd.targets import Target, load_target
from vsd.targets.inputs import Inputs
from vsd.training.batch import Collator, DraftDataset, real
from vsd.training.features import compute_features

_BATCH = 16


def answered(target: Target, a: argparse.Namespace) -> list[Example]:
    """The prompts with the target's own greedy answers."""
    turns = plain_answers(target, load_prompts(a.prompts), 128, a.answers)
    return [Example(Inputs(q + r), [False] * (len(q) + 1) + [True] * (len(r) - 1)) for _, q, r in turns if len(r) > 1]


@torch.no_grad()
def hits(target: Target, drafter: Eagle3Drafter, examples: list[Example], steps: int) -> Tensor:
    """Share of tokens [2, K] that are the drafter's first, and among its first four."""
    found, count = torch.zeros(2, steps), torch.zeros(steps)
    dataset, draft_of = DraftDataset(examples), drafter.draft_of()
    for start in range(0, len(examples), _BATCH):
        batch = Collator()([dataset[i] for i in range(start, min(start + _BATCH, len(examples)))])
        ids, drafted = batch["input_ids"], batch["drafted"]
        paths = recorded(ids, drafted, real(batch), steps)
        next_ids = ids.roll(-1, dims=1)
        words = target.embed(consumed(next_ids, paths)).float()
        aux = compute_features(target, ids, drafted).aux.float()
        hidden = drafter(aux, target.embed(next_ids).float(), paths.roots, words)  # [K, B, Q, h]
        for k in range(steps):
            valid = paths.valid[..., k]
            label = draft_of[paths.tokens[..., k][valid]]
            right = drafter.lm_head(hidden[k][valid]).topk(4).indices == label[:, None]
            found[:, k] += torch.stack([right[:, 0].sum(), right.sum()])
            count[k] += valid.sum()
    return found / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--drafter", nargs="+", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--prompts", nargs="*", default=[])
    parser.add_argument("--answers", type=Path, default=Path("runs/answers.json"), help="where answers are kept")
    parser.add_argument("--sample", type=int, default=64, help="conversations of each text")
    parser.add_argument("--steps", type=int, default=5)
    a = parser.parse_args()
    keep_freed_memory()
    target = load_target(a.target)
    texts = {Path(path).name: load_examples(path, target.tokenizer, 2048, "skip") for path in a.text}
    if a.prompts:
        texts["prompts"] = answered(target, a)
    table = Table("drafter", "text", "first proposal right, step 1, 2, …", "among the first four")
    for path in a.drafter:
        drafter = Eagle3Drafter.from_pretrained(path).eval()
        for name, examples in texts.items():
            some = random.Random(0).sample(examples, min(a.sample, len(examples)))
            shares = [
                ", ".join(f"{share:.3f}" for share in row) for row in hits(target, drafter, some, a.steps).tolist()
            ]
            table.add_row(path, name, *shares)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
