"""`vsd demo` on the embedded target: seconds of training, a short measurement."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vsd import cli, demo
from vsd.demo import logs, parts, scratch
from vsd.drafters import load_drafter
from vsd.evaluation.tune import SHAPES
from vsd.targets import load_target

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few seconds, short texts, questions and trees."""

    def packaged(*given: Any) -> Any:
        examples, held_out = parts.packaged(*given)
        return sorted(examples, key=lambda example: len(example.drafted))[:8], held_out

    for module in (logs, scratch):
        monkeypatch.setattr(module, "packaged", packaged)
    monkeypatch.setattr(parts, "HELD_OUT", 2)
    monkeypatch.setattr(parts, "ANSWER_TOKENS", 24)
    monkeypatch.setattr(parts, "TREES", SHAPES[4:6])
    monkeypatch.setitem(logs.PLAN.ways["VSD"]["objective_options"], "anchors", 4)
    for name, share in {"demo": 0.2, "from_scratch": 0.3}.items():
        shorter = partial(timed, getattr(demo, name), share)
        monkeypatch.setattr(demo, name, shorter)


def timed(run: Callable[..., Any], share: float, minutes: float, *given: Any) -> Any:
    """A demo in a share of the minutes: the command takes no less than one."""
    return run(share * minutes, *given)


def ran(out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """results.json and the page of a demo."""
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
