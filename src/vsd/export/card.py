"""The model card of an exported drafter: target, training, measurements and serving command."""

import json
from pathlib import Path
from typing import Any

from vsd import __version__
from vsd.drafters.load import family_for
from vsd.errors import DataError, in_a_line
from vsd.export.checkpoint import serve_line
from vsd.paths import TreeShape
from vsd.targets import TargetInfo

REPORT = "report.html"  # of `vsd report`, in the folder of an export


def model_card(
    drafter: Any,
    target: TargetInfo,
    kind: str,
    out: Path,
    source: Path,
    bench: Path | None,
    report: bool = False,
) -> str:
    """README.md of an export.

    Args:
        source: the drafter's folder; the parent folder may hold the recipe of the training.
        bench: JSON of `vsd bench` to quote.
    """
    family, recipe, vocabulary = family_for(drafter), source.parent / "recipe.json", drafter.vocabulary
    layers = f" from the inputs of layers {list(drafter.needs.layers)}" if drafter.needs.layers else ""
    lines = [
        "---",
        f"base_model: {target.name}",
        "tags: [speculative-decoding]",
        "---",
        f"# {family.title} for {target.name}",
        "",
        f"{sum(p.numel() for p in drafter.parameters()) / 1e6:.1f} M parameters; drafts {vocabulary.size} of "
        f"{target.vocab_size} tokens{layers}. Made with vsd {__version__}.",
        "",
        "## Serve",
        "",
        f"    {serve_line(family, kind, target.name, out)}",
        "",
        "## Measured",
        "",
        *(_quoted(bench) if bench else ["Nothing: export with `--bench RESULTS.json`."]),
        *(["", f"Curves, intervals and settings: [{REPORT}]({REPORT})."] if report else []),
        "",
        "## Trained",
        "",
        *([f"    {line}" for line in recipe.read_text().splitlines()] if recipe.exists() else ["No recipe was found."]),
    ]
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> list[str]:
    """The measurements in a JSON file of `vsd bench`.

    Raises:
        DataError: it is none.
    """
    try:
        return _measured(json.loads(path.read_text()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"'{path}' is no file of `vsd bench --json` ({in_a_line(error)}): measure again") from error


def _measured(report: dict[str, Any]) -> list[str]:
    """Table rows of the drafters in a report of `vsd bench`."""
    rows = [
        f"| {run['temperature']:g} | {TreeShape(**run['tree'])} | "
        f"{run['tau']:.2f} [{run['tau_ci'][0]:.2f}, {run['tau_ci'][1]:.2f}] | {run['speedup']:.2f} |"
        for run in report["runs"]
        if run["drafter"] is not None
    ]
    machine = report["machine"]
    return [
        "τ is new tokens per target pass, bonus token included, with 95 % bootstrap intervals over "
        f"{len(report['settings']['prompts'])} prompts; {machine['dtype']} on {machine['device']}.",
        "",
        "| temperature | tree (depth × k, nodes) | τ | × plain decoding |",
        "|---|---|---|---|",
        *rows,
    ]
