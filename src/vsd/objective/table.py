"""The objectives by name."""

from collections.abc import Callable, Mapping
from typing import Any

from vsd.errors import VSDError
from vsd.objective.algebra import Objective
from vsd.objective.distillspec import distillspec
from vsd.objective.dpace import dpace
from vsd.objective.eagle3 import eagle3
from vsd.objective.elbo import elbo
from vsd.objective.griffin import griffin
from vsd.objective.gto import gto
from vsd.objective.lk import lk_alpha, lk_lambda
from vsd.objective.vat import vat
from vsd.objective.vsd import vsd

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "eagle3": eagle3,
    "lk_alpha": lk_alpha,
    "lk_lambda": lk_lambda,
    "dpace": dpace,
    "vat": vat,
    "griffin": griffin,
    "distillspec": distillspec,
    "gto": gto,
    "elbo": elbo,
    "vsd": vsd,
}


def objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of that name.

    Raises:
        VSDError: no such objective, an option it does not have, or a combination that means nothing.
    """
    if name not in OBJECTIVES:
        raise VSDError(f"unknown objective '{name}': choose {', '.join(OBJECTIVES)}")
    try:
        return OBJECTIVES[name](**(options or {}))
    except TypeError as error:
        raise VSDError(f"objective {name}: {error}") from error
