"""Pages of the documentation that are made from the code, so that they cannot drift from it.

`pages` maps paths below `docs/` to Markdown. Nothing here needs mkdocs: the tests of the documentation read them, too.
"""

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from vsd.cli import VSD
from vsd.cli.parser import Command, Group, Parser
from vsd.objective import algebra, divergence
from vsd.objective import table as objectives

PARTS = {  # of `vsd`: files and their headings
    "added_paths": "The E-step's paths",
    "arw": "ARW",
    "accepted_length": "ARW for rejection sampling",
    "tree_survival": "ARW for draft trees",
    "car": "CAR",
    "cut_paths": "Cut paths",
    "hard_labels": "Hard labels",
}
BASICS = ("utility", "acceptance")
PACKAGES = {
    "targets": "The frozen model",
    "data": "Conversations and training text",
    "features": "Target features",
    "paths": "Draft trees and paths",
    "drafters": "Drafters",
    "verification": "Verification rules",
    "objective": "Objectives",
    "decoding": "The engine",
    "training": "The trainer",
    "evaluation": "Measurement",
    "report": "Reports",
    "pictures": "Pictures",
    "export": "Export",
    "options": "Options",
    "errors": "Errors",
}
MORE = {  # public, but not in the `__all__` of its package
    "drafters": ("vsd.drafters.base", "vsd.drafters.family"),
    "objective": ("vsd.objective.algebra", "vsd.objective.kinds"),
    "training": ("vsd.training.trainer", "vsd.training.config", "vsd.training.job"),
    "decoding": ("vsd.decoding.engine", "vsd.decoding.sampling", "vsd.decoding.statistics"),
    "verification": ("vsd.verification.walk", "vsd.verification.rejection"),
    "errors": ("vsd.errors",),
}


def pages() -> dict[str, str]:
    """All pages that are made, by their path."""
    found = {"reference/commands.md": commands_page(), "reference/objectives.md": objectives_page()}
    found["reference/api/index.md"] = api_index()
    return found | {f"reference/api/{name}.md": api_page(name) for name in PACKAGES}


def commands_page() -> str:
    """The command-line reference, from the parsers."""
    parser = Parser.of("vsd", VSD)
    parsers = {"vsd": parser, **parser.add_commands(VSD)}
    lines = ["# Command line", "", "Made from the parsers. `vsd COMMAND --help` prints the same in a terminal.", ""]
    for path, each in parsers.items():
        command = _command(path)
        lines += [f"## {path}", "", _text(f"{command.description}"), "", f"    {each.usage}", ""]
        for group in each._action_groups:
            rows = [row for action in group._group_actions for row in _rows(action)]
            if rows:
                lines += [f"| {group.title} | |", "|---|---|", *rows, ""]
        lines += _examples(command.examples)
    return "\n".join(lines)


def _command(path: str) -> Command | Group:
    """The command of a path such as "vsd data check"."""
    found: Command | Group = VSD
    for name in path.split()[1:]:
        assert isinstance(found, Group)
        found = found.commands[name]
    return found


def _rows(action: argparse.Action) -> Iterator[str]:
    """Rows of a table: an option, or the commands of a group with links to them."""
    if isinstance(action, argparse._HelpAction):
        return
    if isinstance(action, argparse._SubParsersAction):
        for choice in action._choices_actions:
            yield f"| [`{choice.dest}`](#{_slug(action.choices[choice.dest].prog)}) | {_cell(choice.help)} |"
        return
    names = ", ".join(action.option_strings) or action.dest
    metavar = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or ''}".rstrip()
    yield f"| `{_cell(names + metavar)}` | {_text(_cell((action.help or '').replace('%%', '%')))} |"


def _slug(title: str) -> str:
    return title.replace(" ", "-")


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _examples(text: str) -> list[str]:
    """Indented lines as blocks of code, the others as prose."""
    lines, code = [""], False
    for line in text.splitlines():
        if line.startswith("  ") != code:
            code = not code
            lines.append("")
        lines.append(f"  {line}" if code else _text(line))
    return [*lines, ""]


def objectives_page() -> str:
    """Every objective: equation and source from its file, options from its builder."""
    lines = [
        "# Objectives",
        "",
        "Made from the files of `src/vsd/objective`. `vsd train --objective NAME --objective-options '{…}'` chooses",
        "one; `vsd objectives` prints the table, `vsd objectives NAME` the options of one. Where an objective has the",
        "option `rule` (`greedy`, `target`, `rejection`), it is the [verification of serving](../sampled-serving.md).",
        "",
        "| objective | meaning | source |",
        "|---|---|---|",
    ]
    described = {name: objectives.describe(name) for name in objectives.OBJECTIVES}
    for name, each in described.items():
        lines.append(
            f"| [`{name}`](#{name}) | {_text(_cell(each.meaning))} | {_cell(f'{each.title} ({each.source})')} |"
        )
    lines += ["", "## Paths × weights × divergence", "", docstring(algebra), "", docstring(divergence), ""]
    for name in BASICS:
        lines += [docstring(importlib.import_module(f"vsd.objective.{name}")), ""]
    for name, builder in objectives.OBJECTIVES.items():
        lines += _objective(name, builder, described[name])
        if name == "vsd":
            for part, title in PARTS.items():
                module = importlib.import_module(f"vsd.objective.{part}")
                lines += [f"### {title}", "", docstring(module), ""]
    return "\n".join(lines)


def _objective(name: str, builder: Callable[..., Any], described: objectives.Description) -> list[str]:
    lines = [f"## {name}", "", docstring(sys.modules[builder.__module__]), ""]
    if not described.options:
        return [*lines, "It has no options.", ""]
    lines += ["| option | value | default | meaning |", "|---|---|---|---|"]
    for option in described.options:
        default = "null" if option.default is None else str(option.default)
        lines.append(f"| `{option.name}` | {_cell(option.kind)} | `{default}` | {_text(_cell(option.help))} |")
    return [*lines, ""]


def docstring(module: Any) -> str:
    """A module's docstring as Markdown, without its legend; indented lines of equations stay blocks of code."""
    text = re.sub(r"\n\nLegend:.*?(?=\n\n|$)", "", inspect.getdoc(module) or "", flags=re.S)
    return "\n".join(line if line.startswith("    ") else _text(line) for line in text.splitlines())


def _text(line: str) -> str:
    """A line of prose in which < and * outside of `code` mean themselves; *emphasis* stays."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def api_index() -> str:
    """The packages, in the order in which they may import each other."""
    lines = ["# Python API", "", "Made from the docstrings. A package imports from those above it.", ""]
    lines += ["| package | contents |", "|---|---|"]
    for name in PACKAGES:
        module = importlib.import_module(f"vsd.{name}")
        first = _cell((inspect.getdoc(module) or "").split("\n\n")[0])
        lines.append(f"| [`vsd.{name}`]({name}.md) | {_text(first)} |")
    return "\n".join(lines) + "\n"


def api_page(name: str) -> str:
    """What a package exports, and its public modules, for mkdocstrings."""
    package = importlib.import_module(f"vsd.{name}")
    lines = [f"# {PACKAGES[name]}", "", docstring(package) if name != "errors" else "", ""]
    modules = MORE.get(name, ())
    for member in getattr(package, "__all__", ()):
        value = getattr(package, member)
        if inspect.isclass(value) or inspect.isfunction(value):
            path = f"{value.__module__}.{value.__qualname__}"
            if value.__module__ not in modules:
                lines += [f"::: {path}", "    options:", "      heading_level: 2", ""]
    for module in modules:
        lines += [f"::: {module}", "    options:", "      heading_level: 2", "      show_root_full_path: true", ""]
    return "\n".join(lines)
