"""Embedding, final norm and LM head of a target, read straight from its safetensors: of a 70B target 4 GB, in seconds.

The model is built without memory for its parameters, so that its modules have the names and kinds that transformers
gives them; then only the tensors of these modules are read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from vsd.errors import TargetError
from vsd.targets.images import image_reader
from vsd.targets.info import OuterModules, TargetInfo, end_ids, outer_modules
from vsd.targets.load import chosen_dtype, device_named, first_line, resolve, without_memory

# Before the base model's own name of a tensor: how checkpoints of whole, bare and multimodal models call it.
_PREFIXES = ("", "model.", "language_model.", "language_model.model.", "model.language_model.", "transformer.")
_HEADS = ("embed_out", "output")  # other names of the LM head
_TOWER, _OLD_TOWER = "vision_tower.", "vision_tower.vision_model."  # checkpoints of CLIP and SigLIP have one level more


def load_target_info(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TargetInfo:
    """Tokenizer and configuration of a target; its embedding, final norm and LM head are read when first used.

    Args:
        name, dtype, device, revision, trust_remote_code: as in `load_target`.

    Raises:
        TargetError: nothing loadable under that name.
    """
    path, where = resolve(name), device_named(device)
    remote = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **remote)
        config = AutoConfig.from_pretrained(path, **remote)
        images = image_reader(path, config, tokenizer, **remote)
    except Exception as error:  # files may hold anything, and tokenizers raises Exception itself
        raise TargetError(f"cannot read the tokenizer of '{name}': {first_line(error)}") from error
    try:
        generation = GenerationConfig.from_pretrained(path, revision=revision or "main")
    except OSError:  # many models have no generation_config.json
        generation = None
    read = partial(_read_outer, path, config, chosen_dtype(dtype, where), where, revision, trust_remote_code)
    return TargetInfo(name, tokenizer, config.get_text_config(), end_ids(generation, tokenizer), read, images)


def _read_outer(
    path: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None,
    trust_remote_code: bool,
) -> OuterModules:
    model = without_memory(config, trust_remote_code)
    outer, shards = outer_modules(model), _Shards(path, revision)
    names = {id(module): name for name, module in model.named_modules()}
    tied = model.config.get_text_config().tie_word_embeddings and not any(
        shards.keys(names[id(outer.head)] + ".weight")
    )
    *whole, last_layer, vision = outer
    for one in (*whole, last_layer, *vision):
        if tied and one is outer.head:
            continue
        for inner, module in one.named_modules(prefix=names[id(one)]):
            for own, parameter in list(module.named_parameters(recurse=False)):
                if one not in whole and parameter.dim() != 1:
                    module.register_parameter(own, None)
                    continue
                read = shards.read(f"{inner}.{own}")
                module.register_parameter(own, nn.Parameter(read.to(device, dtype), requires_grad=False))
    if tied:
        outer.head.weight = outer.embedding.weight
    for one in (*whole, last_layer, *vision):
        one.to(device)
    return outer


class _Shards:
    """The safetensors of a checkpoint, by tensor name."""

    def __init__(self, path: str, revision: str | None) -> None:
        options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        try:
            index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **options)
            if index is not None:
                _, metadata = get_checkpoint_shard_files(path, index, revision=revision)
                folder = index.rpartition("/")[0]
                self.files = {name: f"{folder}/{file}" for name, file in metadata["weight_map"].items()}
                return
            whole = cached_file(path, SAFE_WEIGHTS_NAME, **options)
        except (OSError, ValueError, KeyError) as error:
            raise TargetError(f"cannot read the weights of '{path}': {first_line(error)}") from error
        if whole is None:
            raise TargetError(f"'{path}' has no safetensors: weights in pickles are not read, convert them first")
        with _opened(whole) as file:
            self.files = dict.fromkeys(file.keys(), whole)

    def keys(self, name: str) -> Iterator[str]:
        """Names in the checkpoint that a module's tensor `name` may have there."""
        bare = name
        for prefix in ("model.language_model.", "model.", "transformer.", "gpt_neox."):
            if name.startswith(prefix):
                bare = name.removeprefix(prefix)
                break
        head = [other + name.removeprefix("lm_head") for other in _HEADS] if name.startswith("lm_head") else []
        candidates = [name, *(prefix + bare for prefix in _PREFIXES), *head]
        candidates += [candidate.replace(_TOWER, _OLD_TOWER) for candidate in candidates]
        return (key for key in dict.fromkeys(candidates) if key in self.files)

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            TargetError: the checkpoint lacks it.
        """
        key = next(self.keys(name), None)
        if key is None:
            raise TargetError(f"the checkpoint has no tensor '{name}': its names are not understood")
        with _opened(self.files[key]) as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A file of weights.

    Raises:
        TargetError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise TargetError(f"cannot read the weights in '{path}': {first_line(error)}; copy them again") from error
