"""Write a drafter in an engine's checkpoint format, which the drafter's family defines."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from vsd.drafters import FAMILIES
from vsd.drafters.family import Family
from vsd.drafters.load import family_for
from vsd.errors import ConfigurationError, MismatchError
from vsd.export.gguf import write_gguf
from vsd.targets import TargetInfo
from vsd.targets.load import gguf_file, resolve

FORMATS = tuple(dict.fromkeys(kind for family in FAMILIES.values() for kind in family.formats))


def export_drafter(drafter: Any, target: TargetInfo, out: str | Path, kind: str) -> Path:
    """Write `drafter` to the folder `out` in one of `FORMATS`; returns the folder.

    Raises:
        ConfigurationError: a format that the drafter's family does not have, a family that no engine serves, or a
            folder that is not empty.
        MismatchError: a drafter of another target, or one that engines would load incorrectly.
    """
    out, family = Path(out), family_for(drafter)
    if not family.formats:
        raise ConfigurationError(f"no engine serves a {family.title}: there is nothing to export")
    if kind not in family.formats:
        raise ConfigurationError(f"a {family.title} has no format '{kind}': choose {', '.join(family.formats)}")
    check_new(out)
    drafter.attach(target)
    tensors, config = family.export(drafter, target, kind)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise MismatchError(f"{broken[0]} holds NaN or infinity: an engine would serve it without an error")
    out.mkdir(parents=True, exist_ok=True)
    if kind == "gguf":
        write_gguf(out / "drafter.gguf", tensors, config)
        return out
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if family.needs_tokenizer:
        target.tokenizer.save_pretrained(out)
    return out


def check_new(folder: Path) -> None:
    """Refuse to overwrite files.

    Raises:
        ConfigurationError: the folder holds files.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigurationError(f"'{folder}' is not empty: give another folder")


def serve_line(family: Family, kind: str, target: str, out: str | Path, tokens: int = 3) -> str:
    """The command that serves the target, named as `--target` takes it, with an exported drafter."""
    options = family.serve(kind, str(out), tokens)
    if kind == "gguf":
        return f"llama-server -m {gguf_file(target) or 'TARGET.gguf'} {options}"
    path = resolve(target)
    if kind == "sglang":
        return f"python -m sglang.launch_server --model-path {path} {options}"
    return f"vllm serve {path} {options}"
