"""Values of options: read from YAML, checked against a type annotation, described from a docstring.

Types are checked by jsonargparse; docstrings are read by docstring_parser.
"""

import dataclasses
import re
import reprlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import docstring_parser
import jsonargparse
import yaml

from vsd.errors import ConfigurationError


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: 5e-1 is a number, and yes, no, on and off are strings."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def read_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigurationError: the text is not YAML; the message begins with `source`.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that no calendar has
        raise ConfigurationError(f"{source} is not YAML: {' '.join(str(error).split())}") from error


def checked(name: str, kind: Any, value: Any) -> Any:
    """`value` as the type `kind`; the text of a number is a number, a whole number an integer, a string a list of one.

    Raises:
        ConfigurationError: the value has another type; the message holds `name`, the wanted type and the value.
    """
    wanted = _alternatives(kind)
    if list[str] in wanted and str not in wanted and isinstance(value, str):
        return [value]
    if int in wanted and float not in wanted and isinstance(value, float) and value.is_integer():
        return int(value)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        if (value is None and type(None) not in wanted and Any not in wanted) or _names_a_class(value):
            raise TypeError
        return parser.parse_object({"value": value})["value"]
    except (jsonargparse.ArgumentError, TypeError, RecursionError):
        raise ConfigurationError(f"{name} must be {described(kind)}, not {reprlib.repr(value)}") from None


def _names_a_class(value: Any) -> bool:
    """Whether jsonargparse would import a class that is named in a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (isinstance(value, dict) and "class_path" in value) or any(map(_names_a_class, inner))


def described(kind: Any) -> str:
    """A type annotation in words, as in "learning_rate must be a number"."""
    if get_origin(kind) is Literal:
        *most, last = map(str, get_args(kind))
        return f"{', '.join(most)} or {last}" if most else last
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(described, get_args(kind)))
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a string",
        Path: "a path",
        types.NoneType: "null",
        list: "a list",
        dict: "a mapping {name: value}",
    }
    return words.get(get_origin(kind) or kind, str(kind))


def documented(thing: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The first line of a docstring, and the help of every parameter or attribute, those of base classes included."""
    owners = reversed(thing.__mro__) if isinstance(thing, type) else [thing]
    parsed = [docstring_parser.parse(owner.__doc__ or "") for owner in owners if _is_ours(owner)]
    helps = {p.arg_name: " ".join((p.description or "").split()) for doc in parsed for p in doc.params}
    return parsed[-1].short_description or "", helps


def _is_ours(owner: Any) -> bool:
    return not isinstance(owner, type) or dataclasses.is_dataclass(owner)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
