"""Linear layers of frozen models on a CPU: weights in oneDNN's packed layout, layers of one input joined.

A verification pass has 2-64 rows. With so few rows a plain matmul spends most of its time on re-ordering the weight.
A frozen weight is re-ordered once, here. On two AVX2 cores a (1536, 576) layer takes 206 µs instead of 366 µs at 8
rows, and 134 µs instead of 246 µs at one row: speculative *and* plain decoding are faster.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# oneDNN chooses the layout for a row count. From 8 on it is one layout, fast for every row count; that for 1 is not.
_PACKED_ROWS = 16

# Layers of one input, by the names that nearly all decoders use.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class PackedLinear(nn.Module):
    """`nn.Linear` for inference; the weight is in oneDNN's packed layout."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), _PACKED_ROWS)
        self.packed = packed  # not a buffer: an opaque layout can be neither cast nor saved
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return output


def can_pack(linear: nn.Linear) -> bool:
    """Whether processor, torch build and layer (an `nn.Linear` on the CPU, float32 or bfloat16) support packing."""
    weight = linear.weight
    return (
        type(linear) is nn.Linear
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bfloat16()))
    )


def _has_bfloat16() -> bool:
    """Whether oneDNN supports bfloat16 on this processor (AVX2 alone does not suffice)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module, together: Sequence[Sequence[str]] = TOGETHER) -> int:
    """Pack every `nn.Linear` inside `model` that can be packed, in place; returns their number.

    For frozen modules only: a packed weight has no gradient and is not in `state_dict`.

    Args:
        together: see `join_linears`.
    """
    count = sum(isinstance(module, nn.Linear) and can_pack(module) for module in model.modules())
    if count:
        join_linears(model, together)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and can_pack(child):
                setattr(parent, name, PackedLinear(child))
    return count


def join_linears(model: nn.Module, together: Sequence[Sequence[str]] = TOGETHER) -> None:
    """Compute layers of the same input in one matmul, in place: a wider matmul uses more of the memory bandwidth.

    Args:
        together: groups of layer names; a group is joined in every module that has all of its layers.
    """
    for parent in list(model.modules()):
        for names in together:
            linears = [getattr(parent, name, None) for name in names]
            kinds = {(type(linear), getattr(linear, "bias", None) is None) for linear in linears}
            if kinds in ({(nn.Linear, True)}, {(nn.Linear, False)}):
                joint = _Joint(linears)  # type: ignore[arg-type]
                for i, name in enumerate(names):
                    setattr(parent, name, _Part(joint, i))


class _Joint(nn.Module):
    """Linear layers of one input; the first call with a new input computes all outputs."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.widths = [linear.out_features for linear in linears]
        biased = linears[0].bias is not None
        self.linear = nn.Linear(linears[0].in_features, sum(self.widths), bias=biased, device="meta")
        for name in ("weight", "bias") if biased else ("weight",):
            joined = torch.cat([getattr(linear, name).detach() for linear in linears])
            setattr(self.linear, name, nn.Parameter(joined, requires_grad=False))
        self.input: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}  # outputs for `input` that were not returned yet, by part

    def forward(self, part: int, x: Tensor) -> Tensor:
        """x [..., in] -> the output of layer `part`, [..., out]."""
        if self.input is not x or part not in self.waiting:
            self.input, self.waiting = x, dict(enumerate(self.linear(x).split(self.widths, -1)))
        output = self.waiting.pop(part)
        if not self.waiting:
            self.input = None  # no tensor is kept between passes
        return output


class _Part(nn.Module):
    """One layer of a `_Joint`; stands in the place of the original layer."""

    def __init__(self, joint: _Joint, part: int) -> None:
        super().__init__()
        self.joint, self.part = joint, part

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        output: Tensor = self.joint(self.part, x)
        return output
