"""`vsd demo` on the embedded target: a minute of training, a short measurement."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vsd import demo
from vsd.drafters import load_drafter
from vsd.evaluation.tune import SHAPES
from vsd.targets import load_target

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


def test_a_minute_trains_drafters_that_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two objectives from one start; both drafters accept something, answer for answer on the same questions."""
    monkeypatch.setattr(demo, "HELD_OUT", 4)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 32)
    monkeypatch.setattr(demo, "SHAPES", SHAPES[4:8])
    report = demo.demo(1.0, tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["training"]["steps"] == report["training"]["steps"]
    assert min(report["training"]["steps"].values()) > 0
    plain, *drafted = written["runs"]
    assert plain["drafter"] is None and [run["drafter"] for run in drafted] == ["EAGLE-3", "VSD"]
    assert all(run["tau"] > 1.1 for run in drafted)
    assert all(sum(run["acceptance_per_position"]) > 0 for run in drafted)
    page = (tmp_path / "report.html").read_text()
    assert "Training loss" in page and "the tree that pays" in page and f"{drafted[1]['tau']:.2f}" in page
    load_drafter(tmp_path / "drafter", load_target())
