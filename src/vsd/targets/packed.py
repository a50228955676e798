"""Linear layers of frozen models: on a CPU with oneDNN's pre-packed weights, and neighbours multiplied at once.

A verification pass has 2-64 rows. For so few rows the plain matmul spends most of its time re-ordering the
weight; a weight that never changes is re-ordered once. On two AVX2 cores a (1536, 576) layer takes 206 µs
instead of 366 µs at 8 rows, and 134 µs instead of 246 µs at one: speculative *and* plain decoding gain.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# The row count the layout is chosen for. 8 and above give one layout that is good for every row count; 1 does not.
_PACKED_ROWS = 16

# By the names that nearly all decoders give them.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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


def pack_linears(model: nn.Module, together: Sequence[Sequence[str]] = TOGETHER) -> int:
    """Replace every packable `nn.Linear` inside `model` in place; returns how many there were.

    Call it on frozen modules only: a packed weight has no gradient and is absent from `state_dict`.

    Args:
        together: as for `join_linears`.
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
    """Let layers that are given the same input be computed as one: wider products waste less of the memory bus.

    Args:
        together: names of such layers, wherever one module has all of them.
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
    """Linear layers of one input: whoever is asked first computes all."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.widths = [linear.out_features for linear in linears]
        biased = linears[0].bias is not None
        self.linear = nn.Linear(linears[0].in_features, sum(self.widths), bias=biased, device="meta")
        for name in ("weight", "bias") if biased else ("weight",):
            joined = torch.cat([getattr(linear, name).detach() for linear in linears])
            setattr(self.linear, name, nn.Parameter(joined, requires_grad=False))
        self.input: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}  # outputs for `input` that nobody has asked for yet

    def forward(self, part: int, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out of that part]."""
        if self.input is not x or part not in self.waiting:
            self.input, self.waiting = x, dict(enumerate(self.linear(x).split(self.widths, -1)))
        output = self.waiting.pop(part)
        if not self.waiting:
            self.input = None  # nothing is kept from one pass to the next
        return output


class _Part(nn.Module):
    """One of the layers of a `_Joint`."""

    def __init__(self, joint: _Joint, part: int) -> None:
        super().__init__()
        self.joint, self.part = joint, part

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.joint(self.part, x)
