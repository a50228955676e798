"""How much of a large intermediate result is computed at once, by what the device holds."""

import torch

_BYTES = {"cpu": 8 << 20}  # stays in a CPU's last-level cache
_ACCELERATOR_BYTES = 256 << 20  # a small share of its memory, and enough work for all its cores


def chunk_size(item_bytes: int, device: torch.device) -> int:
    """Number of items, of so many bytes each, that are computed at once: at least one."""
    return max(1, _BYTES.get(device.type, _ACCELERATOR_BYTES) // max(1, item_bytes))
