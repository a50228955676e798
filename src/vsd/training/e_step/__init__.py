"""E-steps: a file for each kind of paths. `E_STEPS` is the one place that lists them.

Each is a class. Construction checks that target and texts allow it. A call returns the posterior of a batch and its
entries for the log. `room` says how many tokens it appends to the target's cache of every text; None: it reads no text.
"""

from typing import Any

from vsd.objective import Continued, Contrasted, Drafted, Objective, Proposed, Recorded
from vsd.training.e_step.base import Batch, Info, Models, Posterior
from vsd.training.e_step.continued import ContinuedStep
from vsd.training.e_step.contrasted import ContrastedStep
from vsd.training.e_step.drafted import DraftedStep
from vsd.training.e_step.proposed import ProposedStep
from vsd.training.e_step.recorded import RecordedStep

E_STEPS: dict[type, Any] = {
    Recorded: RecordedStep,
    Continued: ContinuedStep,
    Drafted: DraftedStep,
    Proposed: ProposedStep,
    Contrasted: ContrastedStep,
}


def e_steps(objective: Objective, models: Models, longest: int) -> list[Any]:
    """The E-step of every part of an objective, for texts of at most `longest` tokens."""
    return [E_STEPS[type(part.paths)](part, part.paths, models, longest) for part in objective.parts]


__all__ = ["E_STEPS", "Batch", "Info", "Models", "Posterior", "e_steps"]
