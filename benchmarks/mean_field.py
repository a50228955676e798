"""How much a block drafter can gain from path-level training: exact enumeration on random targets of K = 4, V = 4.

    python benchmarks/mean_field.py [--targets 20] [--sharpness 2] [--json FILE]

A tabular drafter is trained to the optimum of cross-entropy to p on all 256 paths, then further with each objective.
The drafter is a product of marginals, a Markov chain (DSpark), or a free table (autoregressive). Reported is the
expected accepted length relative to the optimum of cross-entropy: the mean over targets, the 95 % interval of the mean,
and the largest. Two ways of serving: a sampled chain by rejection; and at temperature 0 the drafter's likeliest chain,
where p stands for what the drafter cannot know of the target's one answer.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vsd.evaluation import write_json
from vsd.objective import HeadTarget, PathTarget, fused_loss, objective
from vsd.objective.utility import utility
from vsd.verification.rejection import acceptance

V, K = 4, 4
PATHS = torch.tensor(list(itertools.product(range(V), repeat=K))).T  # [K, 256]
PREFIXES = [prefix for k in range(K) for prefix in itertools.product(range(V), repeat=k)]
INDEX = {prefix: i for i, prefix in enumerate(PREFIXES)}
ROWS = torch.tensor([[INDEX[tuple(path[:k])] for path in PATHS.T.tolist()] for k in range(K)])  # [K, 256]
DRAFTERS = {  # the drafter's state at every prefix
    "product": [len(prefix) for prefix in PREFIXES],
    "Markov chain": [0 if not prefix else 1 + (len(prefix) - 1) * V + prefix[-1] for prefix in PREFIXES],
    "free table": list(range(len(PREFIXES))),
}
Objectives = dict[str, tuple[str, dict[str, Any]]]
CONTROL = "cross-entropy"
GREEDY: Objectives = {
    CONTROL: ("eagle3", {}),
    "dpace": ("dpace", {}),
    "vat": ("vat", {}),
    "vsd, ARW": ("vsd", {"arw": True, "alpha": 0.3}),
    "vsd, ARW, hard labels": ("vsd", {"arw": True, "alpha": 0.3, "hard": True}),
}
REJECTION: Objectives = {
    CONTROL: ("eagle3", {}),
    "dpace": ("dpace", {}),
    "lk_lambda": ("lk_lambda", {}),
    "vsd, rejection": ("vsd", {"rule": "rejection"}),
    "vsd, rejection, ARW": ("vsd", {"rule": "rejection", "arw": True, "alpha": 0.3}),
    "vsd, rejection, ARW, exact": ("vsd", {"rule": "rejection", "arw": True, "alpha": 0.0, "eta": 1e9}),
}


def along(table: Tensor) -> Tensor:
    """Log-probability of every token of every path, [K, 256], of a table [85, V]."""
    return table[ROWS].gather(-1, PATHS[..., None])[..., 0]


def by_rejection(log_p: Tensor, log_q: Tensor) -> float:
    """E_q[accepted tokens] of a sampled chain, exactly."""
    p, q = along(log_p), along(log_q)
    return float((q.sum(0).exp() * utility(acceptance(p, q))).sum())


def greedily(log_p: Tensor, log_q: Tensor) -> float:
    """E_p[accepted tokens] of the drafter's likeliest chain, exactly."""
    chain: tuple[int, ...] = ()
    while len(chain) < K:
        chain = (*chain, int(log_q[INDEX[chain]].argmax()))
    kept = (torch.tensor(chain)[:, None] == PATHS).double()
    return float((along(log_p).sum(0).exp() * utility(kept)).sum())


WAYS: dict[str, tuple[Objectives, Callable[[Tensor, Tensor], float]]] = {
    "chain at temperature 0": (GREEDY, greedily),
    "sampled chain by rejection": (REJECTION, by_rejection),
}


def trained(
    weights: Tensor, states: Tensor, log_p: Tensor, name: str, options: dict[str, Any], steps: int = 400
) -> Tensor:
    """Logits of the drafter's states after training on all paths of the target, weighed by p."""
    terms, law = objective(name, options).parts[0].terms, along(log_p).sum(0).exp()
    eye, hidden = torch.eye(V, dtype=torch.float64), torch.eye(len(PREFIXES), dtype=torch.float64)[ROWS]
    target = HeadTarget(log_p, eye, None, torch.zeros(len(PREFIXES), dtype=torch.float64), lambda x: x)
    paths = PathTarget(PATHS, ROWS, torch.ones_like(PATHS, dtype=torch.bool), share=law, written=True)
    weights = weights.clone().requires_grad_()
    optimiser = torch.optim.Adam([weights], lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        fused_loss(hidden, weights[states].T, target, paths, terms, chunk_rows=4096).loss.backward()
        optimiser.step()
    return weights.detach()


def measure(drafter: str, seed: int, sharpness: float) -> dict[str, dict[str, float]]:
    """The accepted length of one drafter on one target, by way of serving and objective."""
    g = torch.Generator().manual_seed(seed)
    log_p = (sharpness * torch.randn(len(PREFIXES), V, generator=g, dtype=torch.float64)).log_softmax(-1)
    states = torch.tensor(DRAFTERS[drafter])
    start = torch.randn(int(states.max()) + 1, V, generator=g, dtype=torch.float64)
    likely = trained(start, states, log_p, "eagle3", {})
    return {
        way: {
            name: length(log_p, trained(likely, states, log_p, *one)[states].log_softmax(-1))
            for name, one in objectives.items()
        }
        for way, (objectives, length) in WAYS.items()
    }


def show(way: str, lengths: dict[str, list[dict[str, dict[str, float]]]]) -> None:
    table = Table("drafter", "objective", "accepted length", "ratio [95 %]", "largest", title=way)
    for drafter, rows in lengths.items():
        base = np.array([row[way][CONTROL] for row in rows])
        for name in WAYS[way][0]:
            found = np.array([row[way][name] for row in rows])
            ratio, error = found / base, 1.96 * (found / base).std(ddof=1) / len(rows) ** 0.5
            interval = f"{ratio.mean():.3f} [{ratio.mean() - error:.3f}, {ratio.mean() + error:.3f}]"
            table.add_row(drafter, name, f"{found.mean():.3f}", interval, f"{ratio.max():.3f}")
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=20, help="random targets (default 20)")
    parser.add_argument("--sharpness", type=float, default=2.0, help="scale of the target's logits (default 2)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    a = parser.parse_args()
    lengths = {name: [measure(name, seed, a.sharpness) for seed in range(a.targets)] for name in DRAFTERS}
    for way in WAYS:
        show(way, lengths)
    if a.json:
        write_json({"settings": {"targets": a.targets, "sharpness": a.sharpness}, "lengths": lengths}, a.json)


if __name__ == "__main__":
    main()
