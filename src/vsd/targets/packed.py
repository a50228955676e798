"""CPU only: linear layers of the frozen target with oneDNN's pre-packed weights.

A verification pass has 2-64 rows. For so few rows the plain matmul spends most of its time re-ordering the
weight; a weight that never changes is re-ordered once. On two AVX2 cores a (1536, 576) layer takes 206 µs
instead of 366 µs at 8 rows, and 134 µs instead of 246 µs at one: speculative *and* plain decoding gain.
"""

import torch
from torch import Tensor, nn

# The row count the layout is chosen for. 8 and above give one layout that is good for every row count; 1 does not.
_PACKED_ROWS = 16


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, weight held in oneDNN's blocked layout."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), _PACKED_ROWS)
        self.packed = packed  # a plain attribute: opaque layouts can be neither cast nor saved
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(linear: nn.Linear) -> bool:
    """Whether this processor, this build of torch and this layer (float32 or bfloat16 on the CPU) allow packing."""
    weight = linear.weight
    return (
        type(linear) is nn.Linear
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bfloat16()))
    )


def _has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor (not with AVX2 alone)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module) -> int:
    """Replace every packable `nn.Linear` inside `model` in place; returns how many were replaced.

    Call it on frozen modules only: a packed weight has no gradient and is absent from `state_dict`.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and can_pack(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, PackedLinear(child))
    return len(found)
