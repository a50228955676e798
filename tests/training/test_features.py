"""Batches and the feature store: right shapes, the same features as online, and no shard of anything else."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
import tiny_run
from vsd.data import Example
from vsd.errors import VSDError
from vsd.features import FeatureStore, affordable, compute_features, store
from vsd.targets import Inputs, Padded, Target, load_target_info
from vsd.training import Collator, DraftDataset
from vsd.training.batch import texts_of

LAYERS = (0, 2, 3)
T, F = True, False
MULTI_TURN = [
    Example(Inputs([10, 11, 12, 13, 14, 15, 16, 17]), [F, F, F, T, T, F, F, T]),
    Example(Inputs([20, 21, 22, 23]), [F, F, T, F]),
]


@pytest.fixture(scope="module")
def examples(tiny_target: Target) -> list[Example]:
    return [*MULTI_TURN, *tiny_run.tiny_examples(tiny_target, 10)]


def items(examples: list[Example], indices: list[int]) -> list[dict]:
    dataset = DraftDataset(examples)
    return [dataset[i] for i in indices]


def test_the_collator_labels_what_is_drafted() -> None:
    batch = Collator()(items(MULTI_TURN, [0, 1]))
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 22, 23, 0, 0, 0, 0]]
    ignored = -100
    assert batch["labels"].tolist() == [
        [ignored, ignored, ignored, 13, 14, ignored, ignored, 17],
        [ignored, ignored, 22, ignored, ignored, ignored, ignored, ignored],
    ]
    assert batch["drafted"].tolist() == [[3, 4, 7], [2, 2, 2]]


def test_drafted_tokens_are_those_of_every_answer() -> None:
    dataset = DraftDataset(MULTI_TURN)
    assert dataset.drafted_tokens == 4
    assert dataset.draft_vocabulary(30, 4).ids.tolist() == [13, 14, 17, 22]
    with pytest.raises(VSDError, match="nothing to train on"):
        DraftDataset([])


def test_stored_features_are_the_online_ones(
    tiny_target: Target, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SHARD_TOKENS", 120)  # several shards
    monkeypatch.setattr(store, "_BATCH_TOKENS", 100)  # and several passes of mixed lengths in each
    stored = FeatureStore.build(tmp_path, tiny_target, examples, LAYERS)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for indices in ([0, 1], [5, 2, 9], [11]):
        texts = texts_of(Collator()(items(examples, indices)))
        batch = stored.batch(texts)
        online = compute_features(tiny_target, texts.inputs, texts.drafted, LAYERS)
        length, count = texts.inputs.ids.shape[1], texts.drafted.shape[1]
        assert batch.aux.shape == (len(indices), length, 96) and batch.aux.dtype == torch.float32
        assert batch.hidden.shape == (len(indices), count, 32)
        assert batch.log_normaliser.shape == (len(indices), count)
        for b, i in enumerate(indices):
            ids, drafted = examples[i].inputs.ids, examples[i].drafted
            real = slice(0, len(ids)), slice(0, sum(drafted))
            torch.testing.assert_close(batch.aux[b, real[0]], online.aux[b, real[0]], rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(batch.hidden[b, real[1]], online.hidden[b, real[1]], rtol=1e-2, atol=1e-2)
            wanted = online.log_normaliser[b, real[1]]
            torch.testing.assert_close(batch.log_normaliser[b, real[1]], wanted, rtol=1e-5, atol=1e-4)
            assert not batch.aux[b, len(ids) :].any() and not batch.hidden[b, sum(drafted) :].any()


def test_hidden_states_are_those_that_predict_the_drafted_tokens(tiny_target: Target) -> None:
    found = compute_features(tiny_target, Padded.of([MULTI_TURN[0].inputs]), torch.tensor([[3, 4, 7]]), ())
    logits = tiny_target.model(torch.tensor([MULTI_TURN[0].inputs.ids])).logits[0]
    torch.testing.assert_close(tiny_target.logits(found.hidden[0]), logits[[2, 3, 6]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.log_normaliser[0], logits[[2, 3, 6]].logsumexp(-1), rtol=1e-5, atol=1e-4)


def test_an_interrupted_build_computes_only_what_is_missing(
    tiny_target: Target, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SHARD_TOKENS", 120)
    FeatureStore.build(tmp_path, tiny_target, examples, LAYERS)
    shards = sorted(tmp_path.glob("*.safetensors"))
    before = {path: path.read_bytes() for path in shards}
    written = {path: path.stat().st_mtime_ns for path in shards}
    shards[1].unlink()
    (tmp_path / f"{shards[1].name}.part").write_bytes(before[shards[1]][:100])
    computed: list[list[Example]] = []
    real = store._shard

    def counted(target: Target, some: list[Example], *rest: Any) -> dict[str, torch.Tensor]:
        computed.append(some)
        return real(target, some, *rest)

    monkeypatch.setattr(store, "_shard", counted)
    FeatureStore.build(tmp_path, tiny_target, examples, LAYERS)
    assert len(computed) == 1
    assert {path: path.read_bytes() for path in sorted(tmp_path.glob("*.safetensors"))} == before
    assert not list(tmp_path.glob("*.part"))
    assert all(path.stat().st_mtime_ns == written[path] for path in shards if path != shards[1])


def test_workers_compute_what_one_would(
    tiny_target: Target, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SHARD_TOKENS", 120)
    found: list[dict[str, bytes]] = []
    for folder, worker in (("one", (0, 1)), ("several", (1, 2)), ("several", (0, 2))):
        alone = worker == (1, 2)  # the first of two finds that the other's shards are missing
        with pytest.raises(VSDError, match="no complete feature store") if alone else nullcontext():
            FeatureStore.build(tmp_path / folder, tiny_target, examples, LAYERS, worker=worker)
        found.append({path.name: path.read_bytes() for path in sorted((tmp_path / folder).iterdir())})
    one, half, both = found
    shards = [name for name in one if name != "manifest.json"]
    assert [name for name in half if name != "manifest.json"] == shards[1::2]
    assert both == one


def test_features_of_anything_else_are_refused(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    FeatureStore.build(tmp_path, tiny_target, examples, LAYERS)
    other = tiny.tiny_target(seed=1)
    with pytest.raises(VSDError, match=r"made with another target\b"):
        FeatureStore.build(tmp_path, tiny_target, examples, (0, 1, 3))  # other layers
    with pytest.raises(VSDError, match=r"made with another target\b"):
        FeatureStore.build(tmp_path, other, examples, LAYERS)
    with pytest.raises(VSDError, match=r"made with another text\b"):
        FeatureStore.build(tmp_path, tiny_target, examples[1:], LAYERS)
    unmasked = [Example(ids, [False] * 3 + drafted[3:]) for ids, drafted, _ in examples[2:]]
    FeatureStore.build(tmp_path / "mask", tiny_target, examples[2:], LAYERS)
    moved = [Example(ids, [*drafted[1:], True]) for ids, drafted, _ in unmasked]
    with pytest.raises(VSDError, match=r"made with another text\b"):
        FeatureStore.build(tmp_path / "mask", tiny_target, moved, LAYERS)
    tokenizer = tiny_target.tokenizer
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template + " "
        with pytest.raises(VSDError, match=r"made with another (chat )?template\b"):
            FeatureStore.build(tmp_path, tiny_target, examples, LAYERS)
    finally:
        tokenizer.chat_template = template
    FeatureStore.build(tmp_path, tiny_target, examples, LAYERS)  # and still serves its own


def test_the_size_of_a_store_is_known_before(
    tiny_target: Target, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of all files; their headers come on top."""
    monkeypatch.setattr(store, "_SHARD_TOKENS", 120)
    wanted = FeatureStore.missing_bytes(tmp_path, tiny_target, examples, LAYERS)
    FeatureStore.build(tmp_path, tiny_target, examples, LAYERS)
    shards = sorted(tmp_path.glob("*.safetensors"))
    found = sum(tensor.nbytes for path in shards for tensor in load_file(path).values())
    assert wanted == found
    assert FeatureStore.missing_bytes(tmp_path, tiny_target, examples, LAYERS) == 0
    half = sum(tensor.nbytes for path in shards[1:] for tensor in load_file(path).values())
    for path in shards[1:]:
        path.unlink()
    assert FeatureStore.missing_bytes(tmp_path, tiny_target, examples, LAYERS) == half


def test_a_store_that_the_disk_cannot_hold_is_not_begun(
    tiny_target: Target, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = FeatureStore.missing_bytes(tmp_path, tiny_target, examples, LAYERS)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=size - 1))
    with pytest.raises(VSDError, match=r"take .* GB, and .* GB free: give --features online"):
        FeatureStore.build(tmp_path, tiny_target, examples, LAYERS)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=size))
    FeatureStore.build(tmp_path, tiny_target, examples, LAYERS)


def test_features_reach_the_device_as_they_are_stored(
    tiny_target: Target, examples: list[Example], tmp_path: Path
) -> None:
    """Copies to another device are of bfloat16, 4 bytes a number only after that."""
    copied: list[torch.dtype] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if (kwargs or {}).get("device") == torch.device("meta") and args[0].device.type == "cpu":
                copied.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    stored = FeatureStore.build(tmp_path, tiny_target, examples, LAYERS)
    texts = texts_of(Collator()(items(examples, [0, 4])))
    elsewhere = texts._replace(drafted=texts.drafted.to("meta"))
    with Copies():
        batch = stored.batch(elsewhere)
    assert copied == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(field.dtype == torch.float32 and field.device.type == "meta" for field in batch)


def test_no_store_no_features(tiny_target: Target, examples: list[Example], tmp_path: Path) -> None:
    with pytest.raises(VSDError, match="no complete feature store"):
        FeatureStore(tmp_path / "nowhere", tiny_target, examples, LAYERS)


def test_affordable_is_bounded_by_the_text_and_never_nothing(tiny_target: Target, examples: list[Example]) -> None:
    many = examples * 4
    assert affordable(tiny_target, many, 1e6) == len(many)
    assert affordable(tiny_target, many, 0.0) == 16


def test_a_drafter_that_reads_no_features_has_a_store_without(
    tiny_target: Target, examples: list[Example], tmp_path: Path
) -> None:
    stored = FeatureStore.build(tmp_path, tiny_target, examples, ())
    texts = texts_of(Collator()(items(examples, [0, 1, 4])))
    batch, online = stored.batch(texts), compute_features(tiny_target, texts.inputs, texts.drafted, ())
    assert batch.aux.shape == online.aux.shape == (3, texts.inputs.ids.shape[1], 0)
    real = texts.real
    torch.testing.assert_close(batch.log_normaliser[real], online.log_normaliser[real], rtol=1e-5, atol=1e-4)


def test_a_complete_store_is_read_without_the_targets_layers(
    tiny_target: Target, examples: list[Example], tmp_path: Path
) -> None:
    tiny_run.write_target(tiny_target, tmp_path / "target")
    FeatureStore.build(tmp_path / "features", tiny_target, examples, LAYERS)
    info = load_target_info(str(tmp_path / "target"))
    stored = FeatureStore(tmp_path / "features", info, examples, LAYERS)
    assert stored.batch(texts_of(Collator()(items(examples, [3])))).aux.any()
