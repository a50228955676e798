"""`vsd train` on conversations with images, with computed and stored features, and what a checkpoint says of them."""

import json
from pathlib import Path

import pytest
import torch

import seeing
import tiny
from vsd import cli
from vsd.data import load_examples
from vsd.decoding import Engine, Sampling
from vsd.drafters import load_drafter
from vsd.errors import MismatchError
from vsd.features import FeatureStore, InProcess
from vsd.paths import TreeShape
from vsd.targets import load_target
from vsd.targets.inputs import Lazy
from vsd.training import DraftDataset
from vsd.training.batch import Collator, texts_of
from vsd.training.job import prompt_of

LAYERS = (0, 2, 3)


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/, images, and text.jsonl: text, one image, and images in two turns."""
    folder = tmp_path_factory.mktemp("workshop")
    seeing.write(seeing.target(request.param), folder / "target")
    rows = []
    for n in range(9):
        (folder / f"{n}.png").write_bytes(seeing.picture(n, 8 + 4 * n, 16).source)
        image = [{"type": "image", "image": f"{n}.png"}]
        turns = [([], "only text"), (image, "what"), (image, "first")][n % 3]
        messages = [{"role": "user", "content": [*turns[0], {"type": "text", "text": f"{turns[1]} {n}"}]}]
        if not turns[0]:
            messages = [{"role": "user", "content": f"{turns[1]} {n}"}]
        messages.append({"role": "assistant", "content": f"an answer {n}"})
        if n % 3 == 2:
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": "and this?"}]})
            messages.append({"role": "assistant", "content": f"another {n}"})
        rows.append(json.dumps({"messages": messages}) + "\n")
    (folder / "text.jsonl").write_text("".join(rows))
    return folder


def train(workshop: Path, out: Path, *more: str) -> None:
    given = {"--target": workshop / "target", "--data": workshop / "text.jsonl", "--output-dir": out}
    given |= {"--dtype": "float32", "--held-out": 3, "--draft-vocab-size": 64}
    options = ["max_steps=2", "per_device_train_batch_size=3", "eval_steps=2", "eval_max_new_tokens=4"]
    options += ["draft_steps=3", "report_to=none", "disable_tqdm=true", "bf16=no", "use_cpu=true", "save_strategy=no"]
    flags = [str(word) for pair in given.items() for word in pair]
    assert cli.main(["train", *flags, "--set", *options, *more]) in (None, 0)


@pytest.mark.parametrize("more", [("online", "--objective", "vsd"), ("store",)], ids=" ".join)
def test_a_drafter_is_trained_and_decodes(workshop: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    train(workshop, tmp_path / "run", "--features", *more)
    target = load_target(str(workshop / "target"), dtype="float32")
    drafter = load_drafter(tmp_path / "run" / "drafter", target)
    assert drafter.config.image_inputs == "placeholder"
    assert not {"mrope_section", "mrope_interleaved"} & set(drafter.config.rope_parameters)
    examples = load_examples(workshop / "text.jsonl", target.tokenizer, 512, images=target.images)
    prompts = [prompt_of(example) for example in examples]
    plain, drafted = (
        [result.tokens for result in Engine(target, one, TreeShape(3, 2, 6)).generate(prompts, Sampling(8, eos_ids=()))]
        for one in (None, drafter)
    )
    assert drafted == plain


def test_stored_features_are_the_computed_ones(workshop: Path, tmp_path: Path) -> None:
    target = load_target(str(workshop / "target"), dtype="float32")
    examples = load_examples(workshop / "text.jsonl", target.tokenizer, 512, images=target.images)
    store = FeatureStore.build(tmp_path, target, examples, LAYERS)
    dataset = DraftDataset(examples)
    texts = texts_of(Collator()([dataset[i] for i in (1, 0, 2, 5)]))
    computed, stored = InProcess(target, LAYERS).batch(texts), store.batch(texts)
    seen = torch.arange(texts.inputs.ids.shape[1]) < texts.inputs.lengths[:, None]
    torch.testing.assert_close(stored.aux[seen], computed.aux[seen], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(stored.hidden[texts.real], computed.hidden[texts.real], rtol=1e-2, atol=1e-2)


def test_a_store_of_other_images_is_refused(workshop: Path, tmp_path: Path) -> None:
    target = load_target(str(workshop / "target"), dtype="float32")
    examples = load_examples(workshop / "text.jsonl", target.tokenizer, 512, images=target.images)
    FeatureStore.build(tmp_path, target, examples, LAYERS)
    FeatureStore(tmp_path, target, examples, LAYERS)
    extras = examples[1].inputs.extras
    assert isinstance(extras, Lazy)
    other = extras.things[0].source
    content = other.read_bytes()
    try:
        other.write_bytes(seeing.picture(99, 12, 16).source)  # of the same size: the same tokens
        changed = load_examples(workshop / "text.jsonl", target.tokenizer, 512, images=target.images)
        assert [e.inputs.ids for e in changed] == [e.inputs.ids for e in examples]
        with pytest.raises(MismatchError, match="another text"):
            FeatureStore(tmp_path, target, changed, LAYERS)
    finally:
        other.write_bytes(content)


def test_stored_features_need_no_pixels(workshop: Path, tmp_path: Path) -> None:
    target = load_target(str(workshop / "target"), dtype="float32")
    examples = load_examples(workshop / "text.jsonl", target.tokenizer, 512, images=target.images)
    store = FeatureStore.build(tmp_path, target, examples, LAYERS)
    target.images._kept.clear()
    dataset = DraftDataset(examples)
    store.batch(texts_of(Collator()([dataset[i] for i in range(4)])))
    assert not target.images._kept


def test_a_tiny_vocabulary_has_the_image_tokens() -> None:
    assert max(seeing.ID.values()) < tiny.VOCAB
