"""Commands, and their flags from dataclasses of options: jsonargparse parses the flags and checks their types.

A field `max_length: int = 2048` is the flag `--max-length`, with the help that the docstring gives the field. A list
takes several words, and repeated flags add up. Field metadata `positional` makes an argument without a flag (a list:
several of them); `single` makes a list that takes one word a flag.
"""

import argparse
import dataclasses
import difflib
import math
import re
import shutil
import sys
import types
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin

import jsonargparse

from vsd.options.bounds import check_bounds
from vsd.options.values import described, documented

Options = TypeVar("Options")


CHOSEN = "command"  # key of the name of a chosen command


class Command(NamedTuple):
    """A command: its description, examples, groups of options, and the function that reads the options and works."""

    description: str
    examples: str
    options: tuple[type, ...]
    run: "Callable[[Given], None]"


class Group(NamedTuple):
    """A command of commands."""

    description: str
    examples: str
    commands: "dict[str, Command | Group]"


class Parser(jsonargparse.ArgumentParser):
    """A parser that reports a mistake in one line on stderr and exits with code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kinds: dict[str, Any] = {}  # type of every option
        kwargs |= {"formatter_class": _Formatter, "allow_abbrev": False, "default_env": False}
        super().__init__(*args, **kwargs)

    @classmethod
    def of(cls, name: str, command: Command | Group) -> "Parser":
        """The parser of a command; the parsers of a group's commands are added with `add_commands`."""
        options = command.options if isinstance(command, Command) else ()
        words = ["COMMAND"] if isinstance(command, Group) else []
        for field in (f for kind in options for f in dataclasses.fields(kind) if _is_positional(f)):
            word = field.name.upper() + ("…" if get_origin(field.type) is list else "")
            words.append(word if _required(field) else f"[{word}]")
        examples = f"examples:\n{command.examples}"
        parser = cls(
            prog=name, usage=" ".join([name, *words, "[OPTIONS]"]), description=command.description, epilog=examples
        )
        for kind in options:
            parser.add_options(kind)
        return parser

    def add_commands(self, group: Group) -> "dict[str, Parser]":
        """Add the commands of a group; returns all parsers below this one by their names."""
        parsers: dict[str, Parser] = {}
        action = self.add_subcommands(
            required=False, dest=CHOSEN, metavar="COMMAND", title="commands", description=None
        )
        for name, command in group.commands.items():
            path = f"{self.prog} {name}"
            parsers[path] = child = Parser.of(path, command)
            summary = command.description.partition(":")[0].rstrip(".")
            action.add_subcommand(name, child, help=summary[0].lower() + summary[1:])
            child.prog = path  # jsonargparse writes "vsd [options] data"
            if isinstance(command, Group):
                parsers |= child.add_commands(command)
        return parsers

    def add_options(self, options: type) -> None:
        """A group of flags: one for every field of a dataclass."""
        title, helps = documented(options)
        group = self.add_argument_group(title)
        for field in dataclasses.fields(options):
            self.kinds[field.name] = _given_kind(field.type)
            text = _help(helps[field.name], field).replace("%", "%%")
            group.add_argument(*_names(field), default=argparse.SUPPRESS, help=text, **_reading(field))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the mistake in one line."""
        print(f"vsd: {self._in_words(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def _in_words(self, message: str) -> str:
        """A message of jsonargparse or argparse in one line."""
        if found := re.search(r'Parser key "(?:.*\.)?(\w+)":.*?(?:Got|Given) value: (.*)', message, re.S):
            return f"{flag(found[1])} must be {described(self.kinds.get(found[1]))}, not {found[2]!r}"
        if found := re.fullmatch(r"unrecognized arguments: (([^\s=]*).*)", message, re.S):
            near = difflib.get_close_matches(found[2], map(flag, self.kinds), n=1)
            if found[2] in near:  # an argument without a flag
                return f"there is no {found[2]}: give the value alone, as in {self.usage}"
            return f"unknown argument {' '.join(found[1].split())}" + (f": did you mean {near[0]}?" if near else "")
        return " ".join(message.removeprefix("argument ").split())


class Given(NamedTuple):
    """Options that the command line gives, by name; others have their defaults."""

    parser: Parser
    values: dict[str, Any]

    def of(self, options: type[Options]) -> Options:
        """A dataclass of options with the given values; a missing one without a default is a mistake.

        Raises:
            ConfigurationError: a number out of bounds.
        """
        mine = self.of_fields(options)
        missing = [f for f in dataclasses.fields(options) if f.name not in mine and _required(f)]  # type: ignore[arg-type]
        if missing:
            self.parser.error(f"missing {', '.join(_names(f)[0] for f in missing)}")
        check_bounds(mine)
        return options(**mine)

    def of_fields(self, *options: type) -> dict[str, Any]:
        """The given values among the fields of these dataclasses."""
        names = {f.name for kind in options for f in dataclasses.fields(kind)}
        return {name: value for name, value in self.values.items() if name in names}


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help as written: jsonargparse's own formatter would add types and defaults a second time."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        width = min(110, shutil.get_terminal_size((110, 24)).columns - 2)
        super().__init__(prog, **{**kwargs, "max_help_position": 32, "width": width})
        self._action_max_length = 14  # argparse forgets the indentation of commands


def _is_positional(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("positional"))


def _names(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    return (field.name,) if _is_positional(field) else (flag(field.name),)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _reading(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """How a field's words are read, as arguments of `add_argument`."""
    kind, given = _given_kind(field.type), field.metadata
    if _is_positional(field):  # one that is missing is reported by `Given.of`
        return {"type": get_args(kind)[0], "nargs": "*"} if get_origin(kind) is list else {"type": kind, "nargs": "?"}
    if kind is bool and field.default is False:
        return {"action": "store_true"}
    if get_origin(kind) is list:
        several = {"action": "append"} if given.get("single") else {"action": "extend", "nargs": "+"}
        (of,) = get_args(kind)
        return {"type": _number if of is float else of, "metavar": given.get("metavar", _metavar(of)), **several}
    return {"type": kind, "metavar": given.get("metavar", _metavar(kind))}


def _number(word: str) -> float:
    """One number of several; `float` takes nan and inf, which flags of one number refuse."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"invalid float value: {word!r}")
    return value


def _given_kind(kind: Any) -> Any:
    """The type of a value that is given: null is not given by a flag, and a list takes one word or more."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    kinds = [k for k in get_args(kind) if k is not types.NoneType]
    return next((k for k in kinds if get_origin(k) is list), kinds[0])


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if get_origin(kind) is dict:
        return "{NAME: VALUE}"
    return {int: "N", float: "X", str: "TEXT", bool: "{true,false}"}.get(kind, "PATH")


def _help(text: str, field: dataclasses.Field[Any]) -> str:
    """Help with the default, unless the default is nothing."""
    if _required(field):
        return f"{text} (required)"
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is None or default is False or default in ([], {}):
        return text
    values = default if isinstance(default, list) else [default]
    return f"{text} (default: {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)})"
