"""Round trips are bit-exact, conventions are explicit, and what an engine would load wrong is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vsd.drafters import FAMILIES, draft_vocabulary
from vsd.drafters.eagle3 import Eagle3Drafter
from vsd.drafters.load import read_drafter
from vsd.errors import VSDError
from vsd.export import export_drafter
from vsd.export.checkpoint import serve_line
from vsd.targets import Target


@pytest.fixture
def drafter(tiny_target: Target) -> Eagle3Drafter:
    torch.manual_seed(3)
    vocabulary = draft_vocabulary(torch.randint(tiny_target.vocab_size, (400,)), tiny_target.vocab_size, 40)
    layers = [1, 2, 3]  # SGLang can name them
    made = Eagle3Drafter.for_target(tiny_target, vocabulary, intermediate_size=48, aux_layers=layers)
    return made.to(torch.bfloat16).eval()


@pytest.mark.parametrize("kind", ["sglang", "vllm", "speculators"])
def test_round_trip_is_bit_exact(tiny_target: Target, drafter: Eagle3Drafter, tmp_path: Path, kind: str) -> None:
    again = read_drafter(export_drafter(drafter, tiny_target, tmp_path / "out", kind), tiny_target)
    mine, theirs = drafter.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    buffers = dict(again.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in drafter.named_buffers() if "freq" not in name)
    assert again.rotary_emb.inv_freq.dtype == torch.float32  # bfloat16 would move far positions
    assert torch.equal(again.rotary_emb.inv_freq, tiny_target.model.model.rotary_emb.inv_freq)
    for name in ("aux_layers", "rope_parameters", "head_dim", "num_key_value_heads", "target_fingerprint"):
        assert getattr(again.config, name) == getattr(drafter.config, name), name


def test_a_drafter_trained_on_placeholders_is_not_for_sglang(
    tiny_target: Target, drafter: Eagle3Drafter, tmp_path: Path
) -> None:
    drafter.config.image_inputs = "placeholder"
    with pytest.raises(VSDError, match="export it for vllm"):
        export_drafter(drafter, tiny_target, tmp_path / "sglang", "sglang")
    native = export_drafter(drafter, tiny_target, tmp_path / "vllm", "vllm")
    assert json.loads((native / "config.json").read_text())["image_inputs"] == "placeholder"
    assert read_drafter(native, tiny_target).config.image_inputs == "placeholder"


def test_what_engines_read(tiny_target: Target, drafter: Eagle3Drafter, tmp_path: Path) -> None:
    native = export_drafter(drafter, tiny_target, tmp_path / "sglang", "sglang")
    config = json.loads((native / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]  # inputs: vLLM
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]  # outputs: SGLang
    assert (config["tie_word_embeddings"], config["norm_before_residual"]) == (False, False)
    assert config["draft_vocab_size"] == 40 and config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tensors = load_file(native / "model.safetensors")
    assert "midlayer.self_attn.q_proj.weight" in tensors and "embed_tokens.weight" not in tensors
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    ids = torch.arange(40) + tensors["d2t"]
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], ids)  # d2t is an offset

    other = export_drafter(drafter, tiny_target, tmp_path / "speculators", "speculators")
    config = json.loads((other / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3"
    assert config["transformer_layer_config"]["vocab_size"] == tiny_target.vocab_size
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    tensors = load_file(other / "model.safetensors")
    assert "layers.0.self_attn.q_proj.weight" in tensors
    assert torch.equal(tensors["embed_tokens.weight"], tiny_target.embedding_weight)


@pytest.mark.parametrize("kind", ["sglang", "vllm", "speculators"])
def test_a_whole_vocabulary_has_no_map(tiny_target: Target, tmp_path: Path, kind: str) -> None:
    """vLLM refuses a map that maps nothing; reading it back gives one."""
    vocabulary = draft_vocabulary(torch.arange(tiny_target.vocab_size), tiny_target.vocab_size, tiny_target.vocab_size)
    drafter = Eagle3Drafter.for_target(tiny_target, vocabulary, aux_layers=[1, 2, 3])
    out = export_drafter(drafter, tiny_target, tmp_path / "out", kind)
    assert not load_file(out / "model.safetensors").keys() & {"d2t", "t2d"}
    again = read_drafter(out, tiny_target)
    assert torch.equal(again.d2t, drafter.d2t) and torch.equal(again.t2d, drafter.t2d)


def rewrite(
    folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, Tensor | None] | None = None
) -> None:
    if config:
        path = folder / "config.json"
        merged = json.loads(path.read_text()) | config
        path.write_text(json.dumps({name: value for name, value in merged.items() if value is not None}))
    if tensors:
        merged_tensors = load_file(folder / "model.safetensors") | tensors
        save_file({n: t for n, t in merged_tensors.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "tensors", "reason"),
    [
        ({"architectures": ["Nobody"]}, {}, "no drafter family reads it"),
        ({"norm_before_residual": True}, {}, "norm_before_residual"),
        ({"num_hidden_layers": 2}, {}, "2 layers"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}, {}, "do not agree"),
        ({"hidden_size": None}, {}, "lacks hidden_size"),
        ({"intermediate_size": 40}, {}, "the config says"),
        ({}, {"norm.weight": None}, r"lacks \['norm.weight'\]"),
        ({}, {"surplus.weight": torch.ones(1)}, r"unknown tensors \['surplus.weight'\]"),
        ({}, {"d2t": None}, "d2t is missing"),
        ({}, {"d2t": torch.full((40,), 10**6)}, "another target's"),
        ({}, {"t2d": torch.zeros(128, dtype=torch.bool)}, "do not agree"),
        ({}, {"embed_tokens.weight": torch.ones(128, 32)}, "embeddings of its own"),
    ],
)
def test_a_wrong_checkpoint_is_refused_by_name(
    tiny_target: Target,
    drafter: Eagle3Drafter,
    tmp_path: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor | None],
    reason: str,
) -> None:
    folder = export_drafter(drafter, tiny_target, tmp_path / "out", "sglang")
    rewrite(folder, config, tensors)
    with pytest.raises(VSDError, match=reason):
        read_drafter(folder, tiny_target)


def test_checkpoints_of_other_hands(tiny_target: Target, drafter: Eagle3Drafter, tmp_path: Path) -> None:
    """Prefixed names, the target's own embeddings, one aux convention, no rope_parameters, a missing t2d."""
    folder = export_drafter(drafter, tiny_target, tmp_path / "out", "sglang")
    tensors = {f"model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.embed_tokens.weight"] = tiny_target.embedding_weight.detach().clone()
    del tensors["model.t2d"]
    save_file(tensors, folder / "model.safetensors")
    rewrite(folder, {"eagle_aux_hidden_state_layer_ids": None, "rope_parameters": None, "head_dim": None})
    again = read_drafter(folder, tiny_target)
    assert torch.equal(again.t2d, drafter.t2d)
    assert again.config.aux_layers == [1, 2, 3]
    assert again.config.rope_parameters["rope_theta"] == drafter.config.rope_parameters["rope_theta"]


def test_exports_that_would_be_served_wrong(tiny_target: Target, drafter: Eagle3Drafter, tmp_path: Path) -> None:
    with pytest.raises(VSDError, match="has no format 'onnx'"):
        export_drafter(drafter, tiny_target, tmp_path / "a", "onnx")
    export_drafter(drafter, tiny_target, tmp_path / "full", "vllm")
    with pytest.raises(VSDError, match="not empty"):
        export_drafter(drafter, tiny_target, tmp_path / "full", "vllm")
    packed = Eagle3Drafter(drafter.config)
    del packed.lm_head.weight
    with pytest.raises(VSDError, match="packed for decoding"):
        export_drafter(packed, tiny_target, tmp_path / "b", "vllm")
    drafter.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(VSDError, match=r"fc.weight holds NaN"):
        export_drafter(drafter, tiny_target, tmp_path / "b", "vllm")
    assert not (tmp_path / "b").exists()


def test_missing_and_pickled_checkpoints(tiny_target: Target, drafter: Eagle3Drafter, tmp_path: Path) -> None:
    with pytest.raises(VSDError, match=r"no config\.json"):
        read_drafter(tmp_path / "no", tiny_target)
    folder = export_drafter(drafter, tiny_target, tmp_path / "out", "sglang")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(VSDError, match="pickles"):
        read_drafter(folder, tiny_target)
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(VSDError, match="cannot read the weights"):
        read_drafter(folder, tiny_target)


def test_serve_lines() -> None:
    assert "--speculative-algorithm EAGLE3" in serve_line(FAMILIES["eagle3"], "sglang", "org/model", "out")
    line = serve_line(FAMILIES["eagle3"], "vllm", "org/model", "out", 5)
    options = json.loads(line.partition("--speculative-config ")[2].strip("'"))
    assert options == {"method": "eagle3", "model": "out", "num_speculative_tokens": 5}
    line = serve_line(FAMILIES["eagle3"], "gguf", "model.gguf", "out")
    assert line == "llama-server -m model.gguf -md out/drafter.gguf --spec-type draft-eagle3 --spec-draft-n-max 3"
