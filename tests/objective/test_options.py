"""Options of the objectives: types, documentation, defaults, kinds of paths, and refusals by name."""

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest

from vsd.errors import ConfigurationError, VSDError
from vsd.objective import (
    OBJECTIVES,
    Continued,
    Contrasted,
    Drafted,
    Objective,
    Part,
    PathKind,
    Proposed,
    Recorded,
    Term,
    objective,
)
from vsd.objective.divergence import cross_entropy, negative_log_likelihood
from vsd.objective.dpace import Credit
from vsd.objective.eagle3 import Decay
from vsd.objective.elbo import Advantage
from vsd.paths import TreeShape

KINDS = [Recorded, Continued, Drafted, Proposed, Contrasted]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_option_is_typed_documented_and_has_a_default(name: str) -> None:
    """Types, help and defaults of `vsd objectives` are read from the builders."""
    builder = OBJECTIVES[name]
    parameters, hints = inspect.signature(builder).parameters, get_type_hints(builder)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty for p in parameters.values())
    assert hints.keys() == {*parameters, "return"}
    arguments = re.search(r"Args:\n(.*?)(\n\n|\Z)", inspect.getdoc(builder) or "", re.DOTALL)
    assert arguments is not None
    documented = re.findall(r"^    (\w+): \S.*$", arguments[1], re.MULTILINE)
    assert documented == list(parameters)
    first = (sys.modules[builder.__module__].__doc__ or "").splitlines()[0]
    assert re.fullmatch(rf".*`{name}`.*: .+ \([^()]*arXiv:\d{{4}}\.\d{{5}}[^()]*\)\.", first)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, Continued(anchors=16, length=16, epochs=4, weight=2.0)),
        ({"anchors": 32, "length": 8, "epochs": 2, "weight": 1.5}, Continued(32, 8, 2, 1.5)),
        ({"rule": "target", "e_step": "drafted"}, Drafted(16, 4, every=4, weight=0.1, tempering=0.5)),
        (
            {"rule": "rejection", "e_step": "drafted", "samples": 40, "anchors": 2, "every": 1, "tempering": 0.0},
            Drafted(40, 2, every=1, weight=0.1, tempering=0.0),
        ),
        ({"rule": "target", "e_step": "trees"}, Proposed(TreeShape(5, 4, 16), 4, every=4, weight=0.1)),
        (
            {"rule": "target", "e_step": "trees", "tree": "3x2x6", "anchors": 8, "weight": 1.0},
            Proposed(TreeShape(3, 2, 6), 8, every=4, weight=1.0),
        ),
    ],
)
def test_options_of_the_e_step(options: dict[str, Any], kind: PathKind) -> None:
    assert [part.paths for part in objective("vsd", options).parts] == [Recorded(), kind]
    if kind.every == 1:
        assert [part.paths for part in objective("vsd", {**options, "recorded": False}).parts] == [kind]
    else:
        with pytest.raises(ConfigurationError, match="every=1"):
            objective("vsd", {**options, "recorded": False})


@pytest.mark.parametrize("e_step", ["continued", "drafted", "trees", None])
@pytest.mark.parametrize("option", ["anchors", "length", "epochs", "weight", "samples", "every", "tempering", "tree"])
def test_an_option_that_the_e_step_does_not_have_is_refused_by_name(e_step: str | None, option: str) -> None:
    own = {
        "continued": {"anchors", "length", "epochs", "weight"},
        "drafted": {"anchors", "samples", "every", "weight", "tempering"},
        "trees": {"anchors", "tree", "every", "weight"},
        None: set(),
    }[e_step]
    options = {"rule": "target", "e_step": e_step, option: "4x3x9" if option == "tree" else 3}
    if option in own:
        assert len(objective("vsd", options).parts) == 2
    else:
        with pytest.raises(ConfigurationError, match=f"e_step {e_step or 'null'} has no option {option}"):
            objective("vsd", options)


def test_recorded_paths_only() -> None:
    (part,) = objective("vsd", {"e_step": None, "smoothing": 0.3, "lookup": True}).parts
    assert part.paths == Recorded(smoothing=0.3, lookup=True)


def test_kinds_say_whose_tokens_they_hold_and_how_often_they_are_drawn() -> None:
    assert [kind().written for kind in KINDS] == [True, True, False, False, False]
    assert [kind().every for kind in KINDS] == [1] * 5
    assert [kind(every=3).every for kind in (Drafted, Proposed, Contrasted)] == [3] * 3


def trees() -> Part:
    return Part(Proposed(), (Term(Decay(), cross_entropy),))


def text() -> Part:
    return Part(Recorded(), (Term(Decay(), cross_entropy),))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: objective("nonsense"), "choose eagle3"),
        (lambda: objective("eagle3", {"nonsense": 1}), "nonsense"),
        (lambda: objective("vsd", {"temperature": 0.5}), "temperature"),
        (lambda: objective("elbo", {"rule": "greedy"}), "-inf at temperature 0"),
        (lambda: objective("elbo", {"samples": 1}), "at least 2"),
        (lambda: objective("vsd", {"rule": "majority"}), "greedy, target"),
        (lambda: objective("vsd", {"e_step": "copied"}), "continued, drafted"),
        (lambda: objective("distillspec", {"divergence": "l2"}), "fkl, rkl, jsd"),
        (lambda: objective("vispec", {"best": 1}), "best must be at least 2"),
        (lambda: objective("vsd", {"rule": "rejection", "arw": True, "cut": -3.0}), "verify trees"),
        (lambda: objective("vsd", {"arw": True, "cut": -3.0, "smoothing": 0.5}), "whole paths"),
        (lambda: objective("vsd", {"rule": "rejection", "smoothing": 0.5}), "not for rule rejection"),
        (lambda: objective("vsd", {"cut": -3.0}), "need arw: true"),
        (lambda: objective("vsd", {"alpha": 0.5}), "need arw: true"),
        (lambda: objective("vsd", {"arw": True, "alpha": 1.5}), "in \\[0, 1\\]"),
        (lambda: objective("vsd", {"arw": True, "width": 2.0}), "needs cut"),
        (lambda: objective("vsd", {"arw": True, "cut": -3.0, "width": 0.0}), "width must be positive"),
        (lambda: objective("vsd", {"car": -0.5}), "car not negative"),
        (lambda: objective("vsd", {"eta": 2.0}), "rule rejection"),
        (lambda: objective("vsd", {"recorded": False, "hard": True}), "need recorded: true"),
        (lambda: objective("vsd", {"recorded": False, "smoothing": 0.5}), "need recorded: true"),
        (lambda: objective("vsd", {"recorded": False, "lookup": True}), "need recorded: true"),
        (lambda: objective("vsd", {"recorded": False, "e_step": None}), "choose an e_step"),
        (lambda: objective("vsd", {"alpha": 0.5, "rule": "target", "hard": True}), "need arw: true; hard labels"),
        (lambda: objective("vsd", {"rule": "target", "hard": True}), "for rule greedy"),
        (lambda: objective("vsd", {"e_step": "trees"}), "for rule target, not greedy"),
        (lambda: objective("vsd", {"e_step": "drafted"}), "adds nothing"),
        (lambda: objective("vsd", {"rule": "target", "e_step": "trees", "tree": "wide"}), "5x4x16"),
        (lambda: objective("gto", {"tree": "wide"}), "5x4x16"),
        (lambda: objective("gto", {"tree": "5x4x16x0.1"}), "no p_min"),
        (lambda: objective("gto", {"anchors": 1}), "at least 2"),
        (lambda: objective("gto", {"likelihood": 0}), "must be positive"),
        (lambda: objective("gto", {"rule": "rejection"}), "not trees"),
        (lambda: Objective((text(), trees()), "greedy"), "use rule target"),
        (lambda: Objective((text(),), "majority"), "greedy, target, rejection"),  # type: ignore[arg-type]
        (lambda: Objective((Part(Continued(), ()), Part(Continued(), ())), "greedy"), "at most one"),
        (lambda: Drafted(samples=0), "samples must be at least 1"),
        (lambda: Drafted(tempering=-0.1), "tempering must be at least 0"),
        (lambda: Drafted(temperature=0.0), "temperature must be positive"),
        (lambda: Continued(length=1), "length must be at least 2"),
        (lambda: Continued(weight=0.0), "weight must be positive"),
        (lambda: Proposed(every=0), "every must be at least 1"),
        (lambda: Recorded(smoothing=0.0), "never be trained"),
        (lambda: Part(Drafted(), (Term(Credit(), negative_log_likelihood),)), "Credit are not defined on drafted"),
        (lambda: Part(Recorded(), (Term(Advantage(), negative_log_likelihood),)), "not defined on recorded"),
        (lambda: Part(Drafted(), (Term(Decay(), negative_log_likelihood),)), "imitate itself"),
        (
            lambda: Objective((Part(Drafted(every=2), (Term(Advantage(), negative_log_likelihood),)),), "target"),
            "every=1",
        ),
    ],
)
def test_meaningless_combinations_are_refused_with_the_reason(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(VSDError, match=reason):
        make()
