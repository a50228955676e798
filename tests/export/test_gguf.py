"""The GGUF file of an EAGLE-3 drafter, as llama.cpp reads it (served by it: tests/integration)."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from vsd.drafters import draft_vocabulary
from vsd.drafters.eagle3 import Eagle3Drafter
from vsd.errors import VSDError
from vsd.export import export_drafter
from vsd.targets import Target


def made(target: Target, size: int = 40, **options: Any) -> Eagle3Drafter:
    torch.manual_seed(3)
    vocabulary = draft_vocabulary(torch.randint(target.vocab_size, (400,)), target.vocab_size, size)
    sizes = {"intermediate_size": 48, "aux_layers": [1, 2, 3], **options}
    return Eagle3Drafter.for_target(target, vocabulary, **sizes).to(torch.bfloat16).eval()


def exported(drafter: Eagle3Drafter, target: Target, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Fields and tensors of the file."""
    reader = gguf.GGUFReader(export_drafter(drafter, target, folder / "out", "gguf") / "drafter.gguf")
    return {name: field.contents() for name, field in reader.fields.items()}, {
        t.name: values(t) for t in reader.tensors
    }


def values(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """An int64 or a float32 tensor."""
    whole = tensor.tensor_type is gguf.GGMLQuantizationType.I64
    return torch.from_numpy((tensor.data if whole else gguf.dequantize(tensor.data, tensor.tensor_type)).copy())


def test_fields_and_tensors(tiny_target: Target, tmp_path: Path) -> None:
    drafter = made(tiny_target)
    fields, tensors = exported(drafter, tiny_target, tmp_path)
    assert fields["general.architecture"] == "eagle3" and fields["tokenizer.ggml.model"] == "none"
    assert fields["eagle3.target_layers"] == [1, 2, 3]  # layer inputs
    assert (fields["eagle3.embedding_length"], fields["eagle3.vocab_size"]) == (32, 128)
    assert tensors["d2t"].dtype == torch.int64
    assert torch.equal(tensors["d2t"], drafter.vocabulary.ids)  # target ids, not offsets
    state = drafter.state_dict()
    assert torch.equal(tensors["fc.weight"], state["fc.weight"].float())  # exact: bfloat16 stays bfloat16
    assert torch.equal(tensors["blk.0.attn_norm_2.weight"], state["midlayer.hidden_norm.weight"].float())
    assert len(tensors) == len(state) - 1  # all but t2d


def neighbours_rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """llama.cpp's rotation of channels 2 i and 2 i + 1 of x [..., D] by the angles of channel i."""
    out, half = torch.empty_like(x), x.shape[-1] // 2
    for i in range(half):
        a, b = x[..., 2 * i], x[..., 2 * i + 1]
        out[..., 2 * i], out[..., 2 * i + 1] = a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]
    return out


def test_rotated_queries_and_keys_score_as_ours(tiny_target: Target, tmp_path: Path) -> None:
    """q·k of the reordered projections under llama.cpp's rotation equals ours, at two positions."""
    drafter = made(tiny_target)
    _, tensors = exported(drafter, tiny_target, tmp_path)
    attention, a = drafter.midlayer.self_attn.float(), torch.randn(1, 2, 64)
    cos, sin = drafter.rotary_emb(a, torch.tensor([[3, 11]]))
    ours = attention.queries(a, (cos, sin))[0, 0, 0] @ attention.keys_values(a, (cos, sin))[0][0, 0, 1]
    q = (a[0, 0] @ tensors["blk.0.attn_q.weight"].T)[:8]  # first head, D = 8
    k = (a[0, 1] @ tensors["blk.0.attn_k.weight"].T)[:8]
    theirs = neighbours_rotated(q, cos[0, 0], sin[0, 0]) @ neighbours_rotated(k, cos[0, 1], sin[0, 1])
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_scaled_frequencies(tiny_target: Target, tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
    _, tensors = exported(made(tiny_target, rope_parameters=linear), tiny_target, tmp_path)
    assert torch.allclose(tensors["blk.0.rope_freqs.weight"], torch.full((4,), 4.0))


def test_a_whole_vocabulary_has_no_map(tiny_target: Target, tmp_path: Path) -> None:
    vocabulary = draft_vocabulary(torch.arange(128), 128, 128)
    drafter = Eagle3Drafter.for_target(tiny_target, vocabulary, aux_layers=[1, 2, 3])
    assert "d2t" not in exported(drafter, tiny_target, tmp_path)[1]


@pytest.mark.parametrize(
    ("options", "reason"), [({"mlp_bias": True}, "no place for"), ({"hidden_act": "gelu"}, "needs silu")]
)
def test_what_llama_cpp_lacks_is_refused(
    tiny_target: Target, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(VSDError, match=reason):
        export_drafter(made(tiny_target, **options), tiny_target, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
