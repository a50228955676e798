"""A checkpoint as a GGUF file."""

from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from torch import Tensor

_KINDS = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


def write_gguf(path: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    """Write tensors and key-value fields; matrices keep their dtype, vectors are float32 as llama.cpp wants them.

    Args:
        fields: with `general.architecture`; booleans, integers, numbers, strings, and lists of integers.
    """
    rest = dict(fields)
    writer = GGUFWriter(path, rest.pop("general.architecture"))
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in rest.items():
        add[type(value)](name, value)  # type: ignore[operator]
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int64:
            writer.add_tensor(name, tensor.numpy(), raw_dtype=GGMLQuantizationType.I64)
            continue
        kind = GGMLQuantizationType.F32 if tensor.dim() == 1 else _KINDS[tensor.dtype]
        writer.add_tensor(name, quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
