"""Checkpoints of block drafters: round trips are bit-exact, conventions explicit, what vLLM loads wrong is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vsd.drafters import FAMILIES, draft_vocabulary, new_drafter
from vsd.drafters.load import family_of, read_drafter
from vsd.errors import VSDError
from vsd.export import export_drafter
from vsd.targets import Target

FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "peagle": {"num_hidden_layers": 2, "aux_layers": [1, 2, 3]},
    "dflash": {"num_hidden_layers": 2},
    "dflash2": {"num_hidden_layers": 2, "selector_rank": 6, "selector_top_k": 5, "conv_group_size": 8},
    "dspark": {"num_hidden_layers": 2, "markov_rank": 8},
}


def drafter_of(target: Target, family: str, size: int = 40, **options: Any) -> Any:
    torch.manual_seed(3)
    vocabulary = draft_vocabulary(torch.randint(target.vocab_size, (400,)), target.vocab_size, size)
    drafter = new_drafter(target, vocabulary, family, intermediate_size=48, **{**FAMILY_OPTIONS[family], **options})
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.copy_(torch.randn_like(weight))
    drafter.config.draft_steps = 5
    return drafter.to(torch.bfloat16).eval()


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("size", [40, 128])
@pytest.mark.parametrize("kind", ["vllm", "speculators"])
@pytest.mark.parametrize("family", FAMILY_OPTIONS)
def test_round_trip_is_bit_exact(tiny_target: Target, tmp_path: Path, family: str, kind: str, size: int) -> None:
    drafter = drafter_of(tiny_target, family, size)
    folder = export_drafter(drafter, tiny_target, tmp_path / "out", kind)
    assert family_of(folder) is FAMILIES[family]
    again = read_drafter(folder, tiny_target)
    mine, theirs = drafter.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert again.rotary_emb.inv_freq.dtype == torch.float32
    for name, value in drafter.config.to_dict().items():
        if name in type(drafter.config).__annotations__ or name in ("aux_layers", "head_dim", "rope_parameters"):
            assert getattr(again.config, name) == value, name


def test_what_vllm_reads_of_peagle(tiny_target: Target, tmp_path: Path) -> None:
    """vLLM renames any other class than that of EAGLE-3; the mask token is what tells both apart."""
    drafter = drafter_of(tiny_target, "peagle")
    config = config_of(export_drafter(drafter, tiny_target, tmp_path / "vllm", "vllm"))
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["num_hidden_layers"] == 2
    assert config["pard_token"] == drafter.config.mask_token_id
    tensors = load_file(tmp_path / "vllm" / "model.safetensors")
    assert tensors["mask_hidden"].shape == (1, 96) and "layers.1.self_attn.q_proj.weight" in tensors
    config = config_of(export_drafter(drafter, tiny_target, tmp_path / "speculators", "speculators"))
    assert config["speculators_model_type"] == "peagle" and config["mask_token_id"] == drafter.config.mask_token_id
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    options = FAMILIES["peagle"].serve("vllm", "out", 5)
    assert '"method": "eagle3"' in options and '"parallel_drafting": true' in options
    with pytest.raises(VSDError, match="has no format 'sglang'"):
        export_drafter(drafter, tiny_target, tmp_path / "sglang", "sglang")


def test_what_vllm_reads_of_dflash(tiny_target: Target, tmp_path: Path) -> None:
    """Layers are counted by outputs in one format and by inputs in the other; blocks are not causal in both."""
    drafter = drafter_of(tiny_target, "dflash")
    config = config_of(export_drafter(drafter, tiny_target, tmp_path / "vllm", "vllm"))
    assert config["architectures"] == ["DFlashDraftModel"] and config["model_type"] == "qwen3"
    assert drafter.config.aux_layers == [1, 2, 3] and config["dflash_config"]["target_layer_ids"] == [0, 1, 2]
    assert config["dflash_config"]["causal"] is False and config["block_size"] == 6
    config = config_of(export_drafter(drafter, tiny_target, tmp_path / "speculators", "speculators"))
    assert config["aux_hidden_state_layer_ids"] == [1, 2, 3] and config["sliding_window_non_causal"] is True
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    whole = drafter_of(tiny_target, "dflash", 128)
    export_drafter(whole, tiny_target, tmp_path / "whole", "vllm")
    assert not load_file(tmp_path / "whole" / "model.safetensors").keys() & {"lm_head.weight", "d2t", "t2d"}


@pytest.mark.parametrize("options", [{}, {"confidence_head_with_markov": False}, {"enable_confidence_head": False}])
@pytest.mark.parametrize("kind", ["vllm", "speculators"])
def test_what_vllm_reads_of_dspark(tiny_target: Target, tmp_path: Path, kind: str, options: dict[str, bool]) -> None:
    """The confidence head and the flags that say what it reads; a config without flags has no head."""
    folder = export_drafter(drafter_of(tiny_target, "dspark", **options), tiny_target, tmp_path / "out", kind)
    config, tensors = config_of(folder), load_file(folder / "model.safetensors")
    names = ("enable_confidence_head", "confidence_head_with_markov")
    assert [config[name] for name in names] == [options.get(name, True) for name in names]
    width = 32 + 8 * config["confidence_head_with_markov"]
    if config["enable_confidence_head"]:
        assert tensors.pop("confidence_head.proj.weight").shape == (1, width)
        assert tensors.pop("confidence_head.proj.bias").shape == (1,)
    assert not any("confidence" in name for name in tensors)
    again = read_drafter(folder, tiny_target)
    assert [getattr(again.config, name) for name in names] == [config[name] for name in names]
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in names}))
    assert read_drafter(folder, tiny_target).confidence_head is None


def test_what_vllm_reads_of_dflash2(tiny_target: Target, tmp_path: Path) -> None:
    """Sizes in `dflash_config`, in speculators' format at the top; shapes of the tensors that vLLM allocates."""
    drafter = drafter_of(tiny_target, "dflash2")
    sizes = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 5}
    config = config_of(export_drafter(drafter, tiny_target, tmp_path / "vllm", "vllm"))
    assert config["architectures"] == ["DFlash2DraftModel"] and config["model_type"] == "qwen3"
    assert config["dflash_config"].items() >= sizes.items() and config["dflash_config"]["target_layer_ids"] == [0, 1, 2]
    tensors = load_file(tmp_path / "vllm" / "model.safetensors")
    assert tensors["layers.1.mlp_conv.base_kernel"].shape == (2, 2, 32)
    assert tensors["layers.0.attention_conv.kernel_projection.weight"].shape == (2 * 2 * 32 // 8, 32)
    assert tensors["candidate_selector.predecessor_codebook"].shape == (128, 6)
    assert tensors["candidate_selector.hidden_projection.weight"].shape == (6, 32)
    assert not tensors.keys() & {"lm_head.weight", "d2t", "t2d"}
    config = config_of(export_drafter(drafter, tiny_target, tmp_path / "speculators", "speculators"))
    assert config["speculators_model_type"] == "dflash2" and config.items() >= sizes.items()
    assert config["aux_hidden_state_layer_ids"] == [1, 2, 3] and config["sliding_window_non_causal"] is True
    assert '"method": "dflash"' in FAMILIES["dflash2"].serve("vllm", "out", 5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"draft_vocab_size": 40}, "drafts 40 of 128 tokens"),
        ({"input_embedding_scale": 2.0}, "input_embedding_scale"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"selector_top_k": 129}, "does not fit"),
    ],
)
def test_other_drafters_of_dflash2s_class_are_refused(
    tiny_target: Target, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = export_drafter(drafter_of(tiny_target, "dflash2"), tiny_target, tmp_path / "out", "vllm")
    config = config_of(folder)
    own = {"draft_vocab_size": change.pop("draft_vocab_size", 128), "dflash_config": config["dflash_config"] | change}
    (folder / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(VSDError, match=reason):
        read_drafter(folder, tiny_target)


def test_blocks_that_an_engine_would_run_otherwise_are_refused(tiny_target: Target, tmp_path: Path) -> None:
    with pytest.raises(VSDError, match="predicts nothing at the root"):
        export_drafter(drafter_of(tiny_target, "dflash", sample_from_anchor=True), tiny_target, tmp_path / "a", "vllm")
    with pytest.raises(VSDError, match="predicts nothing at the root"):
        export_drafter(drafter_of(tiny_target, "dflash2", sample_from_anchor=True), tiny_target, tmp_path / "a", "vllm")
    with pytest.raises(VSDError, match="never causal"):
        export_drafter(drafter_of(tiny_target, "dflash", causal=True), tiny_target, tmp_path / "a", "speculators")
    with pytest.raises(VSDError, match="no layer's output"):
        export_drafter(drafter_of(tiny_target, "dspark", aux_layers=[0, 2]), tiny_target, tmp_path / "a", "vllm")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"is_neox_style": False}, "another rotation"),
        ({"dflash_config": {"mask_token_id": 3}}, "names no feature layers, or no mask token"),
        ({"dflash_config": {"target_layer_ids": [0, 1, 2]}}, "names no feature layers, or no mask token"),
        ({"dflash_config": {"target_layer_ids": [0, 1, 2], "mask_token_id": 3, "use_swa": True}}, "use_swa"),
        ({"num_hidden_layers": 1}, "unknown tensors"),
    ],
)
def test_other_drafters_of_the_class_are_refused(
    tiny_target: Target, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = export_drafter(drafter_of(tiny_target, "dflash"), tiny_target, tmp_path / "out", "vllm")
    (folder / "config.json").write_text(json.dumps(config_of(folder) | change))
    with pytest.raises(VSDError, match=reason):
        read_drafter(folder, tiny_target)


def test_released_checkpoints_are_read(tiny_target: Target, tmp_path: Path) -> None:
    """As others write them: a flat mask_hidden, the target's embeddings, no t2d; a mask embedding is refused."""
    drafter = drafter_of(tiny_target, "peagle")
    folder = export_drafter(drafter, tiny_target, tmp_path / "out", "speculators")
    tensors = load_file(folder / "model.safetensors")
    tensors["mask_hidden"] = tensors["mask_hidden"].view(1, 1, -1)
    del tensors["t2d"]
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(read_drafter(folder, tiny_target).mask_hidden, drafter.mask_hidden)
    other = export_drafter(drafter_of(tiny_target, "dflash"), tiny_target, tmp_path / "dflash", "vllm")
    (other / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(VSDError, match="mask embedding of its own"):
        read_drafter(other, tiny_target)
