"""A target whose layers are spread over several GPUs; tensors without memory stand on devices that are not there."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import check_device_map
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

import architectures
import seeing
import tiny
from vsd.errors import VSDError
from vsd.targets import Inputs, Padded, load_target
from vsd.targets.decoder import Decoder, Output
from vsd.targets.load import without_memory
from vsd.targets.split import device_map
from vsd.training.job import train
from vsd.training.recipe import recipe

GPUS = [torch.device("lazy", i) for i in range(3)]  # any kind that has indices and needs no driver
LAYERS = [0, 1, 3]


@pytest.mark.parametrize("name", [*architectures.ARCHITECTURES, *seeing.FAMILIES])
def test_every_weight_has_one_device(name: str) -> None:
    model = (seeing.target(name) if name in seeing.FAMILIES else architectures.ARCHITECTURES[name]()).model
    found = device_map(model, GPUS)
    check_device_map(model, found)  # raises where a weight has none
    of_layers = [device.index for part, device in found.items() if part.rpartition(".")[2].isdecimal()]
    assert len(of_layers) == model.config.get_text_config().num_hidden_layers and of_layers == sorted(of_layers)
    assert {device for part, device in found.items() if not part.rpartition(".")[2].isdecimal()} == {GPUS[0]}
    assert not any(part.startswith(f"{other}.") for part in found for other in found)


def test_the_first_device_has_fewer_layers_by_the_size_of_the_rest() -> None:
    model = tiny.tiny_target().model
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    rest = sum(weight.numel() for weight in model.parameters()) - 4 * layer
    assert 0.5 * layer < rest < 1.5 * layer  # so that two devices share five parts
    found = device_map(model, GPUS[:2])
    assert [found[f"model.layers.{i}"].index for i in range(4)] == [0, 0, 1, 1]
    model.resize_token_embeddings(1280)
    found = device_map(model, GPUS[:2])
    assert [found[f"model.layers.{i}"].index for i in range(4)] == [1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # by accelerate, to find tied weights
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_every_pass_keeps_its_tensors_on_their_devices(kind: str) -> None:
    """An operation on tensors of two devices raises, without memory as with it."""
    config = architectures.ARCHITECTURES[kind]().model.config
    with FakeTensorMode(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        places = device_map(model, GPUS)
        assert set(places.values()) == set(GPUS)
        places["model.layers.3"] = places["model.layers.1"]  # no matter in which order
        for part, device in places.items():
            place(model.get_submodule(part), device)
        decoder = Decoder(dispatch_model(model, places))
        ids = torch.zeros(2, 5, dtype=torch.long, device=GPUS[0])
        positions = torch.arange(5, device=GPUS[0]).expand(2, -1)
        cache, causal = decoder.new_cache(2, 4), torch.ones(1, 5, 5, dtype=torch.bool, device=GPUS[0]).tril()
        for committed in (0, 5):
            cache.slots.fill, cache.lengths = committed, torch.full_like(cache.lengths, committed)
            check(decoder.nodes(ids, positions + committed, causal, cache, layers=LAYERS))
        for store in cache.slots.stores:
            here = [layer for layer in cache.layers if layer.keys.device == store.keys.device]
            assert len(store.keys) == store.used == len(here)
            assert store.keys.shape[3] >= 10
            store.move(ids, ids)
            store.select(torch.zeros(1, dtype=torch.long, device=GPUS[0]), 5)
        assert {store.keys.device for store in cache.slots.stores} == {layer.keys.device for layer in cache.layers}
        with pytest.raises(VSDError, match="several GPUs cannot be compiled"):
            decoder.compile()


def place(part: nn.Module, device: torch.device) -> None:
    """`Module.to` and accelerate cannot do it with parameters that have no memory."""
    for module in part.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(weight.detach().to(device), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def check(output: Output) -> None:
    assert output.hidden.device == output.aux.device == GPUS[0]
    assert output.aux.shape[-1] == len(LAYERS) * output.hidden.shape[-1]


def test_a_loaded_target_has_the_same_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, inputs = architectures.llama(), Padded.of([Inputs([3, 1, 4, 1, 5])])
    target.model.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    maps = []
    monkeypatch.setattr("vsd.targets.load.gpus", lambda: [torch.device("cpu")] * 2)
    monkeypatch.setattr("vsd.targets.load.device_map", lambda *a: maps.append(device_map(*a)) or maps[0])
    loaded = load_target(str(tmp_path), device="split", dtype="float32")
    assert maps == [device_map(target.model, [torch.device("cpu")] * 2)]
    for mine, theirs in zip(loaded.features(inputs, LAYERS), target.features(inputs, LAYERS)):
        torch.testing.assert_close(mine, theirs)


def test_tied_weights_count_once() -> None:
    config = architectures.llama().model.config
    config.tie_word_embeddings, config.vocab_size = True, 600
    whole = AutoModelForCausalLM.from_config(config)
    assert device_map(without_memory(config, False), GPUS) == device_map(whole, GPUS)


def test_one_process_alone_spreads_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, config = recipe(None, ["device=split", "data=x.jsonl"], {"output_dir": str(tmp_path)})
    assert job.device == "split"
    monkeypatch.setattr("vsd.training.job.PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(VSDError, match="for one process, and there are 2"):
        train(job, config, resume=False)


def test_it_needs_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(VSDError, match="there are 0: use auto"):
        load_target(device="split")
