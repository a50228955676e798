"""`torch.compile` for models that are frozen."""

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import config


def compiled(function: Callable[..., Any], device: torch.device, **options: Any) -> Callable[..., Any]:
    """`function`, compiled; on a CPU its weights become constants in the layout that inductor's matmuls like best."""
    traced, frozen = torch.compile(function, **options), device.type == "cpu"

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), config.patch(freezing=frozen):
            return traced(*args, **kwargs)

    return run
