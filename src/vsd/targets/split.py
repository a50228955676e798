"""A target whose layers are spread over several GPUs.

Embedding, final norm, LM head and a vision tower stand on the first GPU, which has fewer layers for it. The drafter and
its training are there, too; their memory is not counted. Hidden states move from GPU to GPU inside the model (hooks of
`accelerate`). Every GPU waits for the one before: this is for targets that do not fit on one.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from vsd.errors import ConfigurationError
from vsd.targets.info import decoder_of

SPLIT = "split"


def gpus() -> list[torch.device]:
    """All GPUs.

    Raises:
        ConfigurationError: there are fewer than two.
    """
    count = torch.cuda.device_count()
    if count < 2:
        raise ConfigurationError(f"--device split spreads a target over several GPUs, and there are {count}: use auto")
    return [torch.device("cuda", i) for i in range(count)]


def device_map(model: PreTrainedModel, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """The device of every part of a model, by its name; the model may be without memory for its weights.

    Raises:
        TargetError: its decoder layers cannot be found.
    """
    _, layers = decoder_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    of_layers = {f"{names[id(layers)]}.{i}": device for i, device in enumerate(_spread(model, layers, devices))}
    return dict.fromkeys(_others(model, layers, names), devices[0]) | of_layers


def _others(model: nn.Module, layers: nn.Module, names: dict[int, str]) -> list[str]:
    """The largest parts of a model that hold none of its decoder layers, and parameters beside such parts."""
    found = []
    for child in model.children():
        if child is not layers:
            inside = any(module is layers for module in child.modules())
            found += _others(child, layers, names) if inside else [names[id(child)]]
    prefix = f"{names[id(model)]}." if names[id(model)] else ""
    return found + [prefix + name for name, _ in model.named_parameters(recurse=False)]


def _spread(model: nn.Module, layers: nn.ModuleList, devices: Sequence[torch.device]) -> list[torch.device]:
    """The device of every layer, in order: equally many weights on all devices, the rest of the model on the first."""
    sizes = [_size(layer) for layer in layers]
    total = _size(model)
    share, found, before = total / len(devices), [], total - sum(sizes)
    for size in sizes:
        found.append(devices[min(len(devices) - 1, int((before + size / 2) / share))])
        before += size
    return found


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
