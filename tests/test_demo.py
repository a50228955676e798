"""`vsd demo` on the embedded target: a minute of training, a short measurement."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vsd import cli
from vsd.demo import logs, parts, scratch
from vsd.drafters import load_drafter
from vsd.evaluation.tune import SHAPES
from vsd.targets import load_target

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All threads; a few texts, questions and trees."""

    def packaged(*given: Any) -> Any:
        examples, held_out = parts.packaged(*given)
        return examples[:8], held_out

    for module in (logs, scratch):
        monkeypatch.setattr(module, "packaged", packaged)
    monkeypatch.setattr(parts, "HELD_OUT", 2)
    monkeypatch.setattr(parts, "ANSWER_TOKENS", 24)
    monkeypatch.setattr(parts, "TREES", SHAPES[4:6])
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


def ran(out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """results.json and the page of a demo of one minute."""
    assert cli.main(["demo", *options, "--minutes", "1", "--out", str(out)]) == 0
    load_drafter(out / "drafter", load_target())
    return json.loads((out / "results.json").read_text()), (out / "report.html").read_text()


def test_a_released_drafter_is_continued_with_two_objectives(tmp_path: Path) -> None:
    found, page = ran(tmp_path)
    plain, released, *continued = found["runs"]
    assert plain["drafter"] is None and released["drafter"] == "released" and released["tau"] > 1.2
    assert [run["drafter"] for run in continued] == ["EAGLE-3", "VSD"] and all(run["tau"] > 1.2 for run in continued)
    assert (
        set(found["training"]["steps"]) == {"start", "EAGLE-3", "VSD"} and min(found["training"]["steps"].values()) > 0
    )
    assert "Held-out τ" in page and "the tree that pays" in page and f"{released['tau']:.2f}" in page


def test_drafters_from_random_weights_are_accepted(tmp_path: Path) -> None:
    found, page = ran(tmp_path, "--from-scratch")
    plain, *drafted = found["runs"]
    assert plain["drafter"] is None and [run["drafter"] for run in drafted] == ["EAGLE-3", "VSD"]
    assert all(run["tau"] > 1 and sum(run["acceptance_per_position"]) > 0 for run in drafted)
    assert set(found["training"]["steps"]) == {"start", "EAGLE-3", "VSD"}
    assert "the tree that pays" in page and f"{drafted[1]['tau']:.2f}" in page
