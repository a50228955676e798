"""Loading a target: folders, the formats that are refused, and errors of one line."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OlmoConfig

import along
import architectures
import tiny
from architectures import llama
from vsd.errors import VSDError
from vsd.targets import EMBEDDED, Inputs, Padded, Target, load_target
from vsd.targets.load import cache_directory, fastest_dtype, resolve
from vsd.targets.packed import PackedLinear, pack_linears


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Path]:
    target, folder = llama(), tmp_path_factory.mktemp("target")
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    return target, folder


def test_a_saved_folder_loads(saved: tuple[Target, Path]) -> None:
    target, folder = saved
    ids = torch.arange(20, 32)[None]
    expected = target.features(along.text(ids), (1, 2))
    for pack in (False, True):
        loaded = load_target(str(folder), dtype="float32", device="cpu", pack=pack)
        assert any(isinstance(m, PackedLinear) for m in loaded.model.modules()) == pack
        torch.testing.assert_close(loaded.features(along.text(ids), (1, 2)).aux, expected.aux)
        torch.testing.assert_close(
            loaded.logits(loaded.features(along.text(ids)).hidden), target.logits(expected.hidden)
        )
        assert loaded.fingerprint() == target.fingerprint()
        assert loaded.name == str(folder)
        assert loaded.tokenizer.encode("Hi!") == target.tokenizer.encode("Hi!")
        assert loaded.eos_ids == target.eos_ids
    half = load_target(str(folder), dtype="bfloat16", device="cpu")
    assert half.model.dtype == torch.bfloat16 and half.fingerprint() == target.fingerprint()


def test_layers_without_weights_of_their_own_have_a_cache() -> None:
    """OLMo's norms have no weights, and packed matrices are none."""
    target = architectures.build(OlmoConfig(**architectures.SIZES))
    inputs = Padded.of([Inputs([3, 1, 4, 1, 5])])
    expected = target.features(inputs).hidden
    pack_linears(target.model)
    assert not any(list(layer.parameters()) for layer in target.decoder.layers)
    found, _ = target.read(inputs, room=4)
    torch.testing.assert_close(found.hidden, expected)


def test_pickled_weights_are_refused(saved: tuple[Target, Path], tmp_path: Path) -> None:
    target, _ = saved
    target.model.config.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    torch.save(target.model.state_dict(), tmp_path / "pytorch_model.bin")
    _refused(str(tmp_path), "safetensors", dtype="float32")


def test_errors_are_one_line(saved: tuple[Target, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refused(str(tmp_path / "nowhere"), "no folder")
    _refused("./nowhere-at-all", "no folder")
    _refused("~/nowhere-at-all", "no folder")
    _refused(str(tmp_path / "nothing.gguf"), "no GGUF file")
    _refused(str(saved[1]), "unknown dtype 'int3': choose auto, float32, bfloat16, float16", dtype="int3")
    _refused(str(tmp_path), "cannot load target", dtype="float32")  # an empty folder
    monkeypatch.setenv("VSD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"not a model at all" * 100)
    _refused(str(tmp_path / "broken.gguf"), "cannot read GGUF file", dtype="float32")


def _refused(name: str, reason: str, dtype: str = "float32") -> None:
    with pytest.raises(VSDError, match=reason) as caught:
        load_target(name, dtype=dtype, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 16}, "gptqmodel"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "optimum"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao", "quant_type": "int8wo"}, "torchao"),
    ],
)
def test_a_quantised_target_names_the_package_that_reads_it(
    settings: dict[str, Any], package: str, saved: tuple[Target, Path], tmp_path: Path
) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    shutil.copytree(saved[1], tmp_path / "target")
    config = tmp_path / "target" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": settings}))
    _refused(str(config.parent), package, dtype="float32")


def test_resolve_leaves_hub_ids_and_folders_alone(tmp_path: Path) -> None:
    assert resolve("someone/some-model") == "someone/some-model"
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("~") == str(Path.home())
    assert EMBEDDED == "smollm2-135m"


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("VSD_CACHE", raising=False)
    assert cache_directory() == Path("/somewhere/vsd")
    monkeypatch.setenv("VSD_CACHE", "/elsewhere")
    assert cache_directory() == Path("/elsewhere")


def test_fastest_dtype_is_one_of_two() -> None:
    assert fastest_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert tiny.tiny_target().model.dtype == torch.float32
