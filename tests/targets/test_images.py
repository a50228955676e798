"""Targets that read images: what drafter and verifier read equals the model's own pass over its processor's inputs."""

import io
import json
import pickle
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import seeing
from vsd.errors import DataError, TargetError
from vsd.targets import Inputs, Padded, Target, load_target, load_target_info
from vsd.targets.images import Picture

LAYERS = (0, 2, 3)
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
WIDE, TALL, SMALL = seeing.picture(0, 24, 16), seeing.picture(1, 9, 30), seeing.picture(2)
ROWS = [
    ("hello # what is it", (WIDE,)),
    ("no image in this one, only text", ()),
    ("# and # differ", (TALL, SMALL)),
    ("a # b", (SMALL,)),
]


@pytest.fixture(scope="module", params=seeing.FAMILIES)
def target(request: pytest.FixtureRequest) -> Target:
    return seeing.target(request.param)


def language_layers(target: Target) -> nn.ModuleList:
    base = target.model.model
    return (base.text_model if hasattr(base, "text_model") else base.language_model).layers


@torch.no_grad()
def own(target: Target, text: str, pictures: tuple[Picture, ...], more: list[int]) -> tuple[Tensor, Tensor]:
    """(layer inputs [N, n h], logits [N, V]) of the model's own forward over text and more tokens behind it."""
    taken: list[Tensor] = []
    hooks = [
        language_layers(target)[i].register_forward_pre_hook(
            lambda _, args, kwargs: taken.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for i in LAYERS
    ]
    inputs = seeing.plain(target, text, *pictures, more=more)
    logits = target.model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return torch.cat(taken, dim=-1)[0], logits[0]


def test_layers_are_those_of_the_language_model(target: Target) -> None:
    """The vision tower has as many."""
    assert target.decoder.layers is language_layers(target)


def test_inputs_are_the_processors(target: Target) -> None:
    for text, pictures in ROWS:
        ours, theirs = seeing.read(target, text, *pictures), seeing.plain(target, text, *pictures)
        assert ours.ids == theirs["input_ids"][0].tolist()
        for name, tensor in ours.extras.items():
            torch.testing.assert_close(tensor, theirs[name])


def test_features_and_logits_of_a_mixed_batch_are_the_models_own(target: Target) -> None:
    more = [40, 41, 42]
    batch = Padded.of([seeing.read(target, text, *pictures).followed_by(more) for text, pictures in ROWS])
    hidden, aux = target.features(batch, LAYERS)
    for b, (text, pictures) in enumerate(ROWS):
        features, logits = own(target, text, pictures, more)
        length = int(batch.lengths[b])
        torch.testing.assert_close(aux[b, :length], features, **CLOSE)
        torch.testing.assert_close(target.logits(hidden[b, :length]), logits, **CLOSE)
    some = batch.only([3, 0])
    again = target.features(some, LAYERS)
    for b, row in enumerate((3, 0)):
        length = int(some.lengths[b])
        torch.testing.assert_close(again.aux[b, :length], aux[row, :length], **CLOSE)


def test_decoding_behind_images_is_text(target: Target) -> None:
    """Prompts in a cache, then nodes: a path of two tokens, and one that branches off behind its first."""
    more = [40, 41]
    prompts = [seeing.read(target, text, *pictures) for text, pictures in ROWS]
    batch = Padded.of(prompts)
    cache = target.new_cache(len(prompts), batch.ids.shape[1] + 3)
    prefilled = target.prefill(batch, cache, LAYERS)
    ids = torch.tensor([[*more, 50]]).expand(len(prompts), -1)
    above = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]).bool()
    positions = cache.next[:, None] + torch.tensor([0, 1, 1])
    output = target.forward(ids, positions, above, cache, layers=LAYERS)
    for b, (text, pictures) in enumerate(ROWS):
        length = int(batch.lengths[b])
        features, logits = own(target, text, pictures, more)
        torch.testing.assert_close(prefilled.aux[b, :length], features[:length], **CLOSE)
        torch.testing.assert_close(output.aux[b, :2], features[length:], **CLOSE)
        torch.testing.assert_close(target.logits(output.hidden[b, :2]), logits[length:], **CLOSE)
        branch = own(target, text, pictures, [more[0], 50])[1]
        torch.testing.assert_close(target.logits(output.hidden[b, 2]), branch[-1], **CLOSE)


def test_the_picture_matters(target: Target) -> None:
    one, other = (target.features(Padded.of([seeing.read(target, "a # b", seeing.picture(n))])).hidden for n in (5, 6))
    assert (one - other).abs().max() > 0.01


def test_inputs_up_to_a_token_keep_the_images_before_it(target: Target) -> None:
    whole = seeing.read(target, "x # y # z", WIDE, SMALL)
    first = seeing.read(target, "x # y ", WIDE)
    short = whole.upto(len(first.ids))
    assert short.ids == first.ids
    assert short.positions is None if first.positions is None else torch.equal(short.positions, first.positions)
    assert short.extras.keys() == first.extras.keys()
    assert all(torch.equal(short.extras[name], first.extras[name]) for name in first.extras)
    assert whole.upto(2).extras == {}


@pytest.mark.parametrize("family", [name for name in seeing.FAMILIES if name != "smolvlm"])
def test_a_saved_folder_loads_without_torchvision(family: str, tmp_path: Path) -> None:
    target = seeing.target(family)
    seeing.write(target, tmp_path)
    loaded, info = load_target(str(tmp_path), dtype="float32"), load_target_info(str(tmp_path), dtype="float32")
    assert loaded.images.marker == info.images.marker == target.images.marker
    assert loaded.fingerprint() == info.fingerprint() == target.fingerprint()
    rows = [seeing.read(target, text, *pictures) for text, pictures in ROWS]
    again = [info.images.inputs(row.ids, pictures) for row, (_, pictures) in zip(rows, ROWS)]
    again = pickle.loads(pickle.dumps(again))  # as workers that load data get them
    hidden = target.features(Padded.of(rows)).hidden
    torch.testing.assert_close(loaded.features(Padded.of(again)).hidden, hidden, **CLOSE)


def test_another_vision_tower_is_another_target() -> None:
    one, other = seeing.target("llava"), seeing.target("llava")
    assert one.fingerprint() == other.fingerprint()
    other = seeing.target("llava")
    with torch.no_grad():
        other.model.model.multi_modal_projector.linear_2.bias.add_(0.5)
    assert Target(other.model, other.tokenizer, name="llava").fingerprint() != one.fingerprint()


def test_text_must_hold_as_many_markers_as_images() -> None:
    reader = seeing.target("llava").images
    with pytest.raises(DataError, match="1 of <image> in the chat template's text and 0 images"):
        reader.expand("a <image>", [])
    with pytest.raises(DataError, match="4 image tokens, and images of 8"):
        reader.inputs([111] * 4, [SMALL, TALL])


def png(width: int = 8, height: int = 8, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def test_unusable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, reason in ((b"not an image", "is not an image"), (b"", "is not an image")):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.png' {reason}"):
            Picture.of(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"b\.png' cannot be read: No such file"):
        Picture.of(tmp_path / "b.png")
    noise = seeing.picture(0, 64, 64).source
    (tmp_path / "c.png").write_bytes(noise[: len(noise) // 2])
    with pytest.raises(DataError, match=r"c\.png' cannot be decoded"):
        Picture.of(tmp_path / "c.png").decoded()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for side in (32, 100):  # a warning, and an error
        with pytest.raises(DataError, match="has more than 1000 pixels"):
            Picture.of(png(side, side), "big")


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    picture = Picture.of(tmp_path / "a.png")
    assert picture.decoded().size == (8, 8)
    (tmp_path / "a.png").write_bytes(png(9, 9))
    with pytest.raises(DataError, match="has changed"):
        picture.decoded()


def test_transparent_places_are_white() -> None:
    assert Picture.of(png(mode="RGBA")).decoded().getpixel((0, 0)) == (255, 255, 255)


def test_a_processor_that_lacks_a_package_is_named(tmp_path: Path) -> None:
    """SmolVLM's wants num2words, for videos."""
    seeing.write(seeing.target("smolvlm"), tmp_path)
    if find_spec("num2words") is None:
        with pytest.raises(TargetError, match=r"cannot load the target's SmolVLMProcessor: .*num2words"):
            load_target_info(str(tmp_path))
    else:
        assert load_target_info(str(tmp_path)).images.marker == "<image>"


def test_processor_settings_are_in_the_digest(tmp_path: Path) -> None:
    target = seeing.target("llava")
    one = seeing.read(target, "#", SMALL)
    assert one.digest != seeing.read(target, "#", WIDE).digest
    assert one.digest == seeing.read(target, "#", SMALL).digest
    seeing.write(target, tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.1, 0.1, 0.1]}))
    other = load_target_info(str(tmp_path))
    assert other.images.inputs(one.ids, [SMALL]).digest != one.digest
    assert Inputs([1, 2]).digest == b""
