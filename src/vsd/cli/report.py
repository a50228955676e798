"""`vsd report`."""

from dataclasses import dataclass, field
from pathlib import Path

from vsd.cli.parser import Command, Given

EXAMPLES = """\
  vsd report runs/a runs/b runs/bench.json --out report.html
  vsd report runs/demo/results.json runs/demo/start runs/demo

The page is one file that needs no network."""


@dataclass
class Report:
    """report

    Attributes:
        run: folders of vsd train, and JSON files of vsd bench and vsd tune
        out: HTML file to write
    """

    run: list[str] = field(metadata={"positional": True})
    out: Path = Path("report.html")


def run(given: Given) -> None:
    """Write the page."""
    from vsd.report import write_report

    a = given.of(Report)
    print(f"report: {write_report(a.run, a.out)}")


COMMAND = Command("Write a page with curves, acceptance and speed of runs.", EXAMPLES, (Report,), run)
