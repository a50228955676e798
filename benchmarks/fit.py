"""Accuracy of a drafter on texts that it was trained on and on others: does it fit its text, does it generalise?

    python benchmarks/fit.py --drafter D [D2 …] --text FILE [FILE …] [--prompts FILE …] [--sample 64]

For K steps from every position of the answers, along the answer itself: share of tokens that are the drafter's best
proposal, and share among its best four. A random sample of conversations of each text is used; the target first answers
the prompts of --prompts.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from acceptance import plain_answers
from vsd.allocator import keep_freed_memory
from vsd.data import Example, load_examples
from vsd.drafters import Drafter, load_drafter
from vsd.drafters.lattice import logits
from vsd.evaluation import load_prompts
from vsd.features import compute_features
from vsd.paths import Entries, recorded
from vsd.targets import Target, load_target
from vsd.training.batch import Collator, DraftDataset, texts_of

_BATCH = 16


def answered_prompts(target: Target, a: argparse.Namespace) -> Sequence[Example]:
    """The prompts of --prompts with the target's greedy answers."""
    turns = plain_answers(target, load_prompts(a.prompts), 128, a.answers)
    return [
        Example(asked.followed_by(answer), [False] * (len(asked.ids) + 1) + [True] * (len(answer) - 1))
        for _, asked, answer in turns
        if len(answer) > 1
    ]


@torch.no_grad()
def accuracy(target: Target, drafter: Drafter, examples: Sequence[Example], steps: int) -> Tensor:
    """Share of tokens that are the drafter's best proposal, and among its best four, [2, K]."""
    found, count = torch.zeros(2, steps), torch.zeros(steps)
    dataset, draft_of = DraftDataset(examples), drafter.vocabulary.rows
    for start in range(0, len(examples), _BATCH):
        texts = texts_of(Collator()([dataset[i] for i in range(start, min(start + _BATCH, len(examples)))]))
        paths = recorded(texts.inputs.ids, texts.drafted, texts.real, steps)
        aux = compute_features(target, texts.inputs, texts.drafted, drafter.needs.layers).aux.float()
        entries = Entries.of(texts.inputs, aux)
        hidden, head = drafter(entries, paths, lambda states, head: (states, head))  # [K, B, Q, h], [Vd, h]
        for k in range(steps):
            valid = paths.valid[..., k]
            label = draft_of[paths.tokens[..., k][valid]]
            right = logits(hidden[k][valid], head).topk(4).indices == label[:, None]
            found[:, k] += torch.stack([right[:, 0].sum(), right.sum()])
            count[k] += valid.sum()
    return found / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--drafter", nargs="+", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--prompts", nargs="*", default=[])
    parser.add_argument("--answers", type=Path, default=Path("runs/answers.json"), help="file of the answers")
    parser.add_argument("--sample", type=int, default=64, help="conversations of each text")
    parser.add_argument("--steps", type=int, default=5)
    a = parser.parse_args()
    keep_freed_memory()
    target = load_target(a.target)
    texts: dict[str, Sequence[Example]] = {
        Path(path).name: load_examples(path, target.tokenizer, 2048, "skip") for path in a.text
    }
    if a.prompts:
        texts["prompts"] = answered_prompts(target, a)
    table = Table("drafter", "text", "best proposal right, step 1, 2, …", "among the best four")
    for path in a.drafter:
        drafter = load_drafter(path, target, trainable=True).eval()
        for name, examples in texts.items():
            sample = random.Random(0).sample(examples, min(a.sample, len(examples)))
            found = accuracy(target, drafter, sample, a.steps).tolist()
            shares = [", ".join(f"{share:.3f}" for share in row) for row in found]
            table.add_row(path, name, *shares)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
