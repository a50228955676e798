"""Paths that the E-step of `vsd` adds to the recorded continuations: option `e_step` and its own options.

- `continued` [ours], the default: alternative continuations sampled from the target at positions of low target
  confidence. The posterior of valid paths is r ∝ p κ. Few paths drawn from the drafter are valid; paths drawn from p
  are valid whatever the drafter does, with κ as their importance weight under r. The recorded text is one draw from p
  already, so the others start where the target could have chosen another token: at positions drawn ∝ 1 - p(x).
- `drafted` [paper], above temperature 0: S paths sampled from the drafter at an anchor. [ours] Shares ∝ exp(β U).
- `trees` [ours], rule target: the trees that decoding would propose; the weight of a node is the exact probability
  that verification reaches the state which predicts it.

Measured (docs/results.md) × `eagle3` in the same time. `continued` without recorded states, from a drafter that has
memorised its text: 1.096 [1.089, 1.104] at T = 0 and 1.091 [1.086, 1.096] at T = 1 in eight minutes. New answers of the
target to the same prompts gain as much (1.099 and 1.101). From a drafter that does not fit its text yet: 1.001 at T = 0
and 1.016 at T = 1. At T = 1 on sampled text, with ARW and CAR: `drafted` 0.994 [0.990, 0.998] on a chain by rejection,
`trees` 0.991 [0.989, 0.994] on a tree.
"""

from collections.abc import Mapping
from typing import Any, Literal

from vsd.errors import ConfigurationError
from vsd.objective.algebra import Rule
from vsd.objective.kinds import Continued, Drafted, PathKind, Proposed
from vsd.paths import TreeShape

EStepPaths = Literal["continued", "drafted", "trees"]

DEFAULTS: dict[EStepPaths, dict[str, Any]] = {
    "continued": {"anchors": 16, "length": 16, "epochs": 4, "weight": 2.0},
    "drafted": {"anchors": 4, "samples": 16, "every": 4, "weight": 0.1, "tempering": 0.5},
    "trees": {"anchors": 4, "tree": "5x4x16", "every": 4, "weight": 0.1},
}


def added_paths(e_step: EStepPaths | None, rule: Rule, options: Mapping[str, Any]) -> PathKind | None:
    """The kind of paths that the E-step adds; None: recorded paths only.

    Args:
        e_step: the name of the kind.
        rule: verification that the drafter is served with.
        options: settings of the kind; None stands for the default.

    Raises:
        ConfigurationError: an unknown E-step, an option that it does not have, or one without use under the rule.
    """
    if e_step is not None and e_step not in DEFAULTS:
        raise ConfigurationError(f"unknown e_step '{e_step}': choose {', '.join(DEFAULTS)}, or null for none")
    given = {name: value for name, value in options.items() if value is not None}
    defaults = {} if e_step is None else DEFAULTS[e_step]
    if unused := sorted(given.keys() - defaults.keys()):
        raise ConfigurationError(
            f"e_step {e_step or 'null'} has no option {', '.join(unused)}: its options are "
            f"{', '.join(defaults) or 'none'}"
        )
    _check_rule(e_step, rule)
    values = {**defaults, **given}
    match e_step:
        case "continued":
            return Continued(**values)
        case "drafted":
            return Drafted(**values)
        case "trees":
            return Proposed(TreeShape.parse(values.pop("tree")), **values)
    return None


def _check_rule(e_step: EStepPaths | None, rule: Rule) -> None:
    if e_step == "drafted" and rule == "greedy":
        raise ConfigurationError(
            "e_step drafted adds nothing at temperature 0: the accepted prefix of a drafted path is recorded text; use "
            "e_step continued"
        )
    if e_step == "trees" and rule != "target":
        raise ConfigurationError(f"e_step trees is for rule target, not {rule}: use e_step continued, or rule target")
