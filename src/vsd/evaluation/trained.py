"""The longest text that a drafter was trained with, as far as its checkpoint tells."""

import json
from pathlib import Path
from typing import Any

from vsd.targets import TargetInfo

_RECIPE = "recipe.json"  # `vsd train` writes it beside the drafter's folder


def trained_length(folder: str | Path, target: TargetInfo) -> int | None:
    """Tokens: `max_length` of the recipe beside the folder, else a context window shorter than the target's, or None.

    Released drafters are trained with texts of up to their `max_position_embeddings`; a drafter whose window is the
    target's says nothing of its texts.
    """
    length = _read(Path(folder).parent / _RECIPE).get("max_length")
    if isinstance(length, int):
        return length
    window = _read(Path(folder) / "config.json").get("max_position_embeddings")
    return window if isinstance(window, int) and target.context is not None and window < target.context else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
