"""Write a report as tables or as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vsd.evaluation.breakdown import falls_beyond
from vsd.files import write_text
from vsd.paths import TreeShape

Run = dict[str, Any]

_SHOWN = 10  # differing answers that are listed


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report of `bench`, one row per run."""
    settings, machine = report["settings"], report["machine"]
    first = settings["concurrency"][0]
    together = "one request" if first == 1 else f"{first} requests"
    table = Table(
        title=f"{len(settings['prompts'])} prompts, ≤ {settings['max_new_tokens']} new tokens, {together} at a time",
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


def print_details(report: dict[str, Any], console: Console | None = None) -> None:
    """Print where the drafters' τ comes from: a table for each kind of slice, one column per run."""
    runs = [run for run in report["runs"] if run["drafter"]]
    if not runs:
        return
    console = console or Console()
    console.rule("details: where τ comes from")
    for field in dict.fromkeys(field for run in runs for field in run["slices"]):
        _print(console, f"τ by {field}", field, runs, [_by_slice(run, field) for run in runs])
    _print(console, "accepted, of all passes", "drafted tokens", runs, [_by_position(run) for run in runs])
    _print(console, "τ by tokens of prompt and answer", "context", runs, [_by_context(run) for run in runs])
    _print(console, "τ by tokens of the answer", "answer", runs, [_by_answer(run) for run in runs])
    prefill = [{"prefill": f"{run['latency']['prefill']:.0f}"} for run in runs]
    _print(console, "milliseconds a prompt", "pass", runs, prefill)
    if len(report["settings"]["concurrency"]) > 1:
        found = [_by_concurrency(run) for run in report["runs"]]
        title = "tokens/s, × plain at the same concurrency, ms a target pass"
        _print(console, title, "requests at a time", report["runs"], found)


def print_server(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report of `compare`: the server's acceptance beside this engine's, and answers that differ."""
    server, console = report["server"], console or Console()
    sides = {server["engine"]: server["acceptance"], f"vsd, chain of {server['depth']}": server["here"]}
    found = {name: side for name, side in sides.items() if side}
    prompts, longest = len(report["settings"]["prompts"]), report["settings"]["max_new_tokens"]
    table = Table("", title=f"{prompts} prompts, ≤ {longest} new tokens, T = 0, one request at a time")
    for name in found:
        table.add_column(name, justify="right")
    for row in dict.fromkeys(row for side in found.values() for row in _acceptance(side)):
        table.add_row(row, *(_acceptance(side)[row] for side in found.values()))
    console.print(table)
    if server["here"]:
        console.print(verdict(server))
    equal = server["answers"] - len(server["differences"])
    console.print(f"answers: {equal} of {server['answers']} equal those of plain decoding here")
    if server["differences"]:
        console.print(_differences(server["differences"]))


def verdict(server: dict[str, Any]) -> str:
    """Whether acceptance differs by more than chance, and from which position on."""
    if (found := server["difference"]) is not None:
        low, high = found["ci"]
        return (
            f"acceptance differs from drafted token {found['position']} on: "
            f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}] on the server"
        )
    if not server["enough"]:
        return "acceptance: too few prompts to tell a difference from chance"
    return "acceptance: no difference beyond chance at any position"


def write_json(report: dict[str, Any], path: str | Path) -> None:
    """Write the report, creating the folder."""
    write_text(Path(path), json.dumps(report, indent=1) + "\n")


def _cells(run: Run) -> list[str]:
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


def _acceptance(side: dict[str, Any]) -> dict[str, str]:
    """The cells of one engine."""
    shares = zip(side["per_position"], side["per_position_ci"])
    return {
        "target passes": str(side["passes"]),
        "1 + accepted a pass": _with_interval(side["length"], side["length_ci"]),
        **{f"accepted {k} or more": _with_interval(*share) for k, share in enumerate(shares, start=1)},
        "tokens/s": f"{side['tokens_per_second']:.1f}",
    }


def _differences(differences: Sequence[dict[str, Any]]) -> Table:
    """The first token at which each answer differs; long lists are cut."""
    table = Table(
        *("prompt", "turn", "token", "here", "server", "margin of the best two logits"),
        title="answers that differ, where they first do",
        caption="A margin near 0, with the second best token on the server, is a floating-point tie.",
    )
    for d in differences[:_SHOWN]:
        here, there = ("end" if d[side] is None else str(d[side]) for side in ("here", "there"))
        second = ", second best" if d["second"] else ""
        table.add_row(
            escape(d["prompt"]), str(d["turn"] + 1), str(d["position"] + 1), here, there, f"{d['margin']:.3g}{second}"
        )
    if len(differences) > _SHOWN:
        table.add_row(f"{len(differences) - _SHOWN} more")
    return table


def _print(console: Console, title: str, rows: str, runs: Sequence[Run], found: Sequence[dict[str, str]]) -> None:
    """A table with one column per run, from the cells of every run by row."""
    temperatures = {run["temperature"] for run in runs}
    table = Table(rows, title=title, title_justify="left")
    for run in runs:
        temperature = f", T = {run['temperature']:g}" if len(temperatures) > 1 else ""
        table.add_column((run["drafter"] or "plain") + temperature, justify="right", overflow="fold")
    for row in dict.fromkeys(row for cells in found for row in cells):
        table.add_row(escape(row), *(cells.get(row, "") for cells in found))
    console.print(table)


def _by_slice(run: Run, field: str) -> dict[str, str]:
    slices = run["slices"].get(field, {})
    return {value: _with_interval(found["tau"], found["tau_ci"]) for value, found in slices.items()}


def _by_position(run: Run) -> dict[str, str]:
    shares = zip(run["acceptance_per_position"], run["acceptance_per_position_ci"])
    return {f"{k} or more": _with_interval(*found) for k, found in enumerate(shares, start=1)}


def _by_context(run: Run) -> dict[str, str]:
    """With a note where the context is longer than the drafter's training texts."""
    rows, trained = run["by_context"], run["trained_length"]
    cells = {}
    for row, falls in zip(rows, falls_beyond(rows, trained)):
        beyond = trained is not None and row["from"] >= trained
        note = f"\n{'falls ' * falls}beyond the {trained} trained" if beyond else ""
        cells[f"{row['from']} to {row['to'] - 1}"] = _with_interval(row["tau"], row["tau_ci"]) + note
    return cells


def _by_answer(run: Run) -> dict[str, str]:
    return {f"{row['from']} to {row['to'] - 1}": _with_interval(row["tau"], row["tau_ci"]) for row in run["by_answer"]}


def _by_concurrency(run: Run) -> dict[str, str]:
    return {
        str(at["concurrency"]): f"{at['tokens_per_second']:.1f}  × {at['speedup']:.2f}  {at['ms_per_pass']:.0f} ms"
        for at in run["by_concurrency"]
    }


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
