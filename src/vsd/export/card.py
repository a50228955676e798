"""The model card of an exported drafter: what it is for, how it was trained, what was measured, how to serve it."""

import json
from pathlib import Path
from typing import Any

from vsd.drafters import Eagle3Drafter
from vsd.export.checkpoint import serve_line
from vsd.paths import TreeShape
from vsd.targets import Target


def model_card(drafter: Eagle3Drafter, target: Target, kind: str, out: Path, source: Path, bench: Path | None) -> str:
    """README.md of an export.

    Args:
        source: the drafter's folder; the recipe of its training is looked for beside it.
        bench: JSON of `vsd bench` to quote.
    """
    config, recipe = drafter.config, source.parent / "recipe.json"
    lines = [
        "---",
        f"base_model: {target.name}",
        "tags: [speculative-decoding, eagle3]",
        "---",
        f"# EAGLE-3 drafter for {target.name}",
        "",
        f"{sum(p.numel() for p in drafter.parameters()) / 1e6:.1f} M parameters; drafts {config.draft_vocab_size} of "
        f"{config.vocab_size} tokens from the inputs of layers {list(config.aux_layers)}. Made with vsd.",
        "",
        "## Serve",
        "",
        f"    {serve_line(kind, target.name, out)}",
        "",
        "## Measured",
        "",
        *(_measured(json.loads(bench.read_text())) if bench else ["Nothing: export with `--bench RESULTS.json`."]),
        "",
        "## Trained",
        "",
        *([f"    {line}" for line in recipe.read_text().splitlines()] if recipe.exists() else ["No recipe was found."]),
    ]
    return "\n".join(lines) + "\n"


def _measured(report: dict[str, Any]) -> list[str]:
    """Drafters' rows of what `vsd bench` wrote."""
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
