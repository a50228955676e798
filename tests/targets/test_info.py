"""Embedding, norm and LM head read from a checkpoint are those of the loaded target."""

import json
from pathlib import Path

import pytest
import torch

import tiny_run
from architectures import ARCHITECTURES
from vsd.errors import TargetError
from vsd.targets import Inputs, Padded, TargetInfo, load_target, load_target_info


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ends_are_those_of_the_loaded_target(name: str, tmp_path: Path) -> None:
    tiny_run.write_target(ARCHITECTURES[name](), tmp_path)
    target = load_target(str(tmp_path), dtype="float32")
    info = load_target_info(str(tmp_path), dtype="float32")
    assert type(info) is TargetInfo
    for layers in ((), (1, 2)):
        assert info.fingerprint(layers) == target.fingerprint(layers)
    assert info.fingerprint() != info.fingerprint((1, 2))
    assert (info.eos_ids, info.vocab_size, info.hidden_size) == (target.eos_ids, target.vocab_size, target.hidden_size)
    assert info.context == target.context == 256
    ids = torch.tensor([[5, 60, 31, 99]])
    torch.testing.assert_close(info.embed(ids), target.embed(ids))
    hidden = target.features(Padded.of([Inputs(ids[0].tolist())])).hidden
    torch.testing.assert_close(info.logits(hidden), target.logits(hidden), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(info.logit(hidden, ids), target.logits(hidden).gather(-1, ids[..., None])[..., 0])
    last: list[torch.Tensor] = []
    hook = target.decoder.layers[-1].register_forward_hook(
        lambda _, __, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    normed = target.features(Padded.of([Inputs(ids[0].tolist())])).hidden
    hook.remove()
    torch.testing.assert_close(info.norm(last[0]), normed)


def test_no_decoder_layer_is_read(tmp_path: Path) -> None:
    """Layers that are not on disk are not missed, but for the norms of the last one."""
    from safetensors.torch import load_file, save_file

    target = ARCHITECTURES["llama"]()
    tiny_run.write_target(target, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    few = {name: t for name, t in tensors.items() if "layers" not in name or ("layers.3" in name and t.dim() == 1)}
    assert len(few) < len(tensors)
    save_file(few, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_target_info(str(tmp_path), dtype="float32").fingerprint() == target.fingerprint()


def test_shards_and_other_names_are_found(tmp_path: Path) -> None:
    """A bare model's checkpoint, in two files with an index."""
    from safetensors.torch import load_file, save_file

    target = ARCHITECTURES["llama"]()
    tiny_run.write_target(target, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    halves = [dict(list(renamed.items())[i::2]) for i in range(2)]
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for half, file in zip(halves, files):
        save_file(half, tmp_path / file, metadata={"format": "pt"})
    weight_map = {name: file for half, file in zip(halves, files) for name in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert load_target_info(str(tmp_path), dtype="float32").fingerprint() == target.fingerprint()


def test_a_target_without_weights_says_so_when_they_are_needed(tmp_path: Path) -> None:
    tiny_run.write_target(ARCHITECTURES["llama"](), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    info = load_target_info(str(tmp_path))
    assert info.vocab_size == 128  # a server may hold the weights
    with pytest.raises(TargetError, match="has no safetensors"):
        info.fingerprint()
