"""Write a report as a table or as JSON."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vsd.files import write_text
from vsd.paths import TreeShape


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report of `bench`, one row per run."""
    settings, machine = report["settings"], report["machine"]
    table = Table(
        title=f"{len(settings['prompts'])} prompts, ≤ {settings['max_new_tokens']} new tokens, one request at a time",
        caption=(
            f"τ: new tokens per target pass, bonus token included. [ ]: 95 % paired bootstrap over prompts. "
            f"{machine['dtype']}, {machine['device']} {machine['cpu_capability']}, {machine['threads']} threads."
        ),
    )
    for column in (
        "decoding",
        "T",
        "tree",
        "τ",
        "tokens/s",
        "× plain",
        "× generate",
        "draft/verify/commit ms",
    ):
        table.add_column(column, justify="left" if column == "decoding" else "right")
    for run in report["runs"]:
        table.add_row(*_cells(run))
    (console or Console()).print(table)


def write_json(report: dict[str, Any], path: str | Path) -> None:
    """Write the report, creating the folder."""
    write_text(Path(path), json.dumps(report, indent=1) + "\n")


def _cells(run: dict[str, Any]) -> list[str]:
    tree, latency = run["tree"], run["latency"]
    return [
        run["drafter"] or "plain",
        f"{run['temperature']:g}",
        str(TreeShape(**tree)) if tree else "",
        f"{run['tau']:.2f}" if tree else "1",
        f"{run['tokens_per_second']:.1f}",
        _with_interval(run["speedup"], run["speedup_ci"]) if tree else "1",
        _with_interval(run["speedup_generate"], run["speedup_generate_ci"]),
        " / ".join(f"{latency[part]:.0f}" for part in ("draft", "verify", "commit")),
    ]


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
