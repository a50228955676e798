"""An exported drafter drafts in vLLM, and in speculators, exactly what it drafts here.

vLLM skips what it does not understand in silence, so the only proof is acceptance: position by position, beside the
chain of our own decoder on the same prompts. `make integration` prints the table; `VSD_PROMPTS` takes other prompts.

`seeing` is the drafter of the embedded target that reads images. vLLM is given chats and pictures, and has to make of
them the tokens and pixel values that vsd makes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from setting import DRAFTER, LENGTH, Asked, speculative
from vsd.decoding import Engine, Sampling
from vsd.decoding.statistics import acceptance_per_position
from vsd.drafters import load_drafter
from vsd.paths import Entries, TreeShape, recorded
from vsd.targets import Inputs, Padded, Target

CASES = [
    ("vllm", 3, "float32"),
    ("vllm", 5, "float32"),
    ("speculators", 3, "float32"),
    ("speculators", 5, "float32"),
    ("vllm", 3, "bfloat16"),
    ("whole", 3, "float32"),
    ("lm", 3, "float32"),
    ("lm", 5, "float32"),
    ("seeing", 3, "float32"),
    ("seeing", 5, "float32"),
]
# A tie: log-probabilities of the two best no further apart than the same sum in another order may move them. In
# bfloat16 logits between 16 and 32 are multiples of 1/8; two of those.
TIE = {"float32": 1e-3, "bfloat16": 0.25}
# Of all passes, by which acceptance at a position may differ. In float32 the texts are the same; in bfloat16 they part
# at ties, and a share of some 950 passes has a standard error of 0.015.
NEAR = {"float32": 0.02, "bfloat16": 0.03}
BATCH = 8


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows to print in the end."""
    rows: list[str] = []
    yield rows
    print("\n| format | k | precision | passes | accepted >= 1, 2, ... by vLLM | by vsd |\n|---|---|---|---|---|---|")
    print("\n".join(rows))


def chain(target: Target, prompts: list[Inputs], k: int, folder: Path) -> tuple[list[float], int]:
    """Our own decoder's acceptance per position, and its passes."""
    engine = Engine(target, load_drafter(folder, target), TreeShape.chain(k))
    batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    results = [result for batch in batches for result in engine.generate(batch, Sampling(LENGTH))]
    return acceptance_per_position(results, k), sum(len(result.accepted) for result in results)


@pytest.mark.parametrize(("kind", "k", "dtype"), CASES, ids=lambda value: str(value))
def test_acceptance_is_ours(
    kind: str,
    k: int,
    dtype: str,
    served: Any,
    asked: Any,
    exported: dict[str, Path],
    table: list[str],
) -> None:
    given: Asked = asked(kind)
    found = served(kind, k, dtype)
    assert found["prompts"] == [inputs.ids for inputs in given.inputs]
    theirs = [count / found["passes"] for count in found["by_position"]]
    ours, passes = chain(given.targets[dtype], given.inputs, k, exported[kind])
    cells = [", ".join(f"{share:.3f}" for share in shares) for shares in (theirs, ours)]
    table.append(f"| {kind} | {k} | {dtype} | {found['passes']}, {passes} | {cells[0]} | {cells[1]} |")
    assert theirs[0] > 0.2  # a drafter that is read wrong accepts next to nothing
    assert all(abs(a - b) <= NEAR[dtype] for a, b in zip(theirs, ours, strict=True)), (theirs, ours)


def test_an_lm_is_served_as_a_draft_model(exported: dict[str, Path]) -> None:
    """`served` gives vLLM these settings; the acceptance is that of the cases above."""
    expected = {"method": "draft_model", "model": str(exported["lm"]), "num_speculative_tokens": 3}
    assert speculative(exported["lm"], 3) == expected


@pytest.mark.parametrize(("kind", "k", "dtype"), CASES, ids=lambda value: str(value))
def test_answers_are_the_targets(kind: str, k: int, dtype: str, served: Any) -> None:
    """Equal to vLLM without a drafter, or different first where its two best tokens are tied."""
    plain, drafted = served(kind, 0, dtype), served(kind, k, dtype)
    for expected, found, top in zip(plain["tokens"], drafted["tokens"], plain["top"], strict=True):
        if expected == found:
            continue
        first = next(i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
        (best, best_logp), (second, second_logp) = top[first]
        assert best == expected[first] and second == found[first]
        assert best_logp - second_logp <= TIE[dtype]
    if dtype == "float32":
        assert sum(a == b for a, b in zip(plain["tokens"], drafted["tokens"])) >= 0.9 * len(plain["tokens"])


def test_speculators_drafts_the_same_logits(
    in_vllm: Any, targets: dict[str, Target], exported: dict[str, Path], prompts: list[list[int]], tmp_path: Path
) -> None:
    """Three steps along a text, float32: equal to 1e-4."""
    target, steps = targets["float32"], 3
    drafter = load_drafter(DRAFTER, target, trainable=True).eval()
    text = Padded.of([Inputs(max(prompts, key=len))])
    aux, T = target.features(text, drafter.needs.layers).aux, text.ids.shape[1] - 1
    inputs = {"aux": aux[:, :-1].contiguous(), "ids": text.ids[:, 1:].contiguous()}
    save_file(inputs, tmp_path / "in.safetensors")
    files = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    in_vllm("draft_in_speculators.py", exported["speculators"], *files, steps)
    theirs = load_file(files[1])["logits"]

    drafted = torch.arange(2, T + 1)[None]
    paths = recorded(text.ids, drafted, torch.ones_like(drafted, dtype=torch.bool), steps)
    with torch.inference_mode():
        logits = drafter(Entries.of(text, aux), paths, lambda states, head: states @ head.T)
    ours = logits[:, 0, : T - steps]  # the paths that have all steps
    assert ours.abs().max() > 1
    assert (ours - theirs[:, : T - steps]).abs().max() < 1e-4
