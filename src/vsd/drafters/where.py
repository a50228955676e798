"""The folder of a drafter: given, in the package, or downloaded from the hub."""

import re
from functools import cache
from importlib.resources import files
from pathlib import Path

from huggingface_hub import snapshot_download

from vsd.errors import MismatchError, in_a_line

EMBEDDED = "smollm2-135m-eagle3"
_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # never pickles


def drafter_folder(name: str | Path) -> Path:
    """The folder that holds the drafter `name`.

    Args:
        name: a folder, a hub id, or "smollm2-135m-eagle3" (EAGLE-3 for SmolLM2-135M-Instruct, in the package).

    Raises:
        MismatchError: the hub does not give it, or the name is empty.
    """
    if not str(name).strip():
        raise MismatchError("--drafter is empty: give a folder or a hub id")
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    if str(name) == EMBEDDED:
        return Path(str(files("vsd"))) / "assets" / EMBEDDED
    return _downloaded(str(name)) if _is_hub_id(str(name)) else folder


def _is_hub_id(name: str) -> bool:
    """owner/name; a path below a folder that exists is none."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).parent.exists()


@cache
def _downloaded(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # of the network, of the hub, or of the disk
        raise MismatchError(
            f"there is no folder '{name}', and the hub does not give a drafter of this name: {in_a_line(error)}"
        ) from error
