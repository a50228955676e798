"""The objectives by name, with their options: parameters of the builders, documented in the builders' docstrings."""

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_type_hints

from vsd.errors import ConfigurationError
from vsd.objective.algebra import Objective
from vsd.objective.distillspec import distillspec
from vsd.objective.dpace import dpace
from vsd.objective.eagle3 import eagle3
from vsd.objective.elbo import elbo
from vsd.objective.griffin import griffin
from vsd.objective.gto import gto
from vsd.objective.lk import lk_alpha, lk_lambda
from vsd.objective.vat import vat
from vsd.objective.vispec import vispec
from vsd.objective.vsd import vsd
from vsd.options.values import checked, described, documented

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "eagle3": eagle3,
    "lk_alpha": lk_alpha,
    "lk_lambda": lk_lambda,
    "dpace": dpace,
    "vat": vat,
    "griffin": griffin,
    "vispec": vispec,
    "distillspec": distillspec,
    "gto": gto,
    "elbo": elbo,
    "vsd": vsd,
}


class Option(NamedTuple):
    """An option of an objective: its type in words, its default and its help."""

    name: str
    kind: str
    default: Any
    help: str


class Description(NamedTuple):
    """An objective: `title` and `source` as the first line of its file states them, `meaning` as its builder does."""

    name: str
    title: str
    source: str
    meaning: str
    options: list[Option]


def objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of that name.

    Raises:
        ConfigurationError: an unknown objective, an unknown option, a value of a wrong type, or options that exclude
            each other.
    """
    builder, kinds = _builder(name), _kinds(name)
    values = dict(options or {})
    if unknown := sorted(values.keys() - kinds.keys()):
        raise ConfigurationError(
            f"objective {name} has no option {', '.join(unknown)}: its options are {', '.join(kinds) or 'none'}"
        )
    for option, kind in kinds.items():
        if option in values:
            values[option] = checked(f"objective {name}: {option}", kind, values[option])
    try:
        return builder(**values)
    except TypeError as error:
        raise ConfigurationError(f"objective {name}: {error}") from error


def describe(name: str) -> Description:
    """Source, meaning and options of an objective.

    Raises:
        ConfigurationError: an unknown objective.
    """
    builder = _builder(name)
    meaning, helps = documented(builder)
    parameters = inspect.signature(builder).parameters
    options = [
        Option(option, described(kind), parameters[option].default, helps.get(option, ""))
        for option, kind in _kinds(name).items()
    ]
    return Description(name, *_title(builder), meaning, options)


def _builder(name: str) -> Callable[..., Objective]:
    if name not in OBJECTIVES:
        raise ConfigurationError(f"unknown objective '{name}': choose {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def _kinds(name: str) -> dict[str, Any]:
    """Types of the options that a builder declares."""
    hints, parameters = get_type_hints(OBJECTIVES[name]), inspect.signature(OBJECTIVES[name]).parameters
    return {option: hints[option] for option, p in parameters.items() if p.kind is not p.VAR_KEYWORD}


def _title(builder: Callable[..., Objective]) -> tuple[str, str]:
    """(title, source) from a module docstring that begins "`name`: title (source)"."""
    first = " ".join((sys.modules[builder.__module__].__doc__ or "").split("\n\n")[0].split())
    found = re.match(r"[^:]*: (?P<title>.*?) \((?P<source>[^()]*arXiv:[^()]*)\)", first)
    return (found["title"], found["source"]) if found else (first, "")
