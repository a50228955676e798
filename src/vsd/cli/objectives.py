"""`vsd objectives`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vsd.cli.parser import Command, Given

if TYPE_CHECKING:
    from vsd.objective.table import Description

EXAMPLES = """\
  vsd objectives                  a table of all objectives
  vsd objectives vsd              the options of one objective
  vsd train --data text.jsonl --objective vsd --objective-options '{anchors: 8}'"""


@dataclass
class Objectives:
    """objective

    Attributes:
        name: an objective, to list its options
    """

    name: str | None = field(default=None, metadata={"positional": True})


def run(given: Given) -> None:
    """Print the table, or the options of one objective."""
    from vsd.objective.table import OBJECTIVES, describe

    name = given.of(Objectives).name
    if name is None:
        _print_all([describe(each) for each in OBJECTIVES])
    else:
        _print_one(describe(name))


def _print_all(found: "list[Description]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("objective", "meaning", "source", title="training objectives")
    for each in found:
        table.add_row(each.name, each.meaning, f"{each.title} ({each.source})")
    Console().print(table)


def _print_one(found: "Description") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{found.name}[/bold]: {found.title} ({found.source})\n{found.meaning}\n", soft_wrap=True)
    table = Table("option", "value", "default", "meaning", title="objective_options")
    for option in found.options:
        table.add_row(option.name, option.kind, "null" if option.default is None else str(option.default), option.help)
    console.print(table)


COMMAND = Command("List training objectives, or the options of one.", EXAMPLES, (Objectives,), run)
