"""Rows with images: read from any format, encoded with their placeholders, bad ones named with their line."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import seeing
from vsd.data import Example, encoded, load_examples, prompt_inputs, read_conversations, regenerate
from vsd.data.pictures import pictures_of
from vsd.data.target_teacher import TargetTeacher
from vsd.errors import DataError
from vsd.targets import Target
from vsd.targets.images import Picture

ANSWER = {"role": "assistant", "content": "a cat"}


@pytest.fixture(scope="module")
def target() -> Target:
    return seeing.target("llava")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png, b.png and sub/c.png."""
    (tmp_path / "sub").mkdir()
    for number, name in enumerate(("a.png", "b.png", "sub/c.png")):
        (tmp_path / name).write_bytes(seeing.picture(number).source)
    return tmp_path


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def url(number: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(seeing.picture(number).source).decode()}"


def asked(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


A, B = {"type": "image", "image": "a.png"}, {"type": "image", "image": "b.png"}
LISTED, LINK = {"type": "image"}, {"type": "image_url"}
LLAVA = [{"from": "human", "value": "<image>\nsee\n<image>"}, {"from": "gpt", "value": "a cat"}]


@pytest.mark.parametrize(
    "row",
    [
        asked(A, text("see"), B),
        asked({**LINK, "image_url": {"url": "a.png"}}, text("see"), {**LINK, "image_url": url(1)}),
        asked({"type": "image", "path": "a.png"}, text("see"), {"type": "image", "url": "b.png"}),
        {**asked(LISTED, text("see"), LISTED), "images": ["a.png", {"path": "b.png"}]},
        {"conversations": LLAVA, "image": ["a.png", "b.png"]},
    ],
    ids=["parts", "OpenAI", "other names", "listed", "LLaVA"],
)
def test_every_form_is_the_same_conversation(row: dict[str, Any], folder: Path) -> None:
    (found,) = read_conversations(write(folder, row))
    assert [part["type"] for part in found.messages[0]["content"]] == ["image", "text", "image"]
    assert found.messages[0]["content"][1]["text"] == "see"
    digests = [picture.digest for picture in pictures_of(found.messages)]
    assert digests == [seeing.picture(0).digest, seeing.picture(1).digest]


def test_listed_images_without_a_place_come_first(folder: Path) -> None:
    (found,) = read_conversations(write(folder, {"prompt": "what is it", "image": "sub/c.png"}), need_answer=False)
    assert [part["type"] for part in found.messages[0]["content"]] == ["image", "text"]
    assert pictures_of(found.messages)[0].source == (folder / "sub/c.png").absolute()


def test_images_of_a_table_are_read(folder: Path) -> None:
    import datasets

    rows = {"prompt": ["one", "two"], "image": [str(folder / "a.png"), str(folder / "b.png")]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "rows.parquet")
    found = list(read_conversations(folder / "rows.parquet", need_answer=False))
    images = [pictures_of(conversation.messages)[0].decoded() for conversation in found]
    assert [image.tobytes() for image in images] == [seeing.picture(n).decoded().tobytes() for n in (0, 1)]


def test_text_that_mentions_the_mark_stays_text(folder: Path) -> None:
    (found,) = read_conversations(write(folder, {"messages": [{"role": "user", "content": "what is <image>"}, ANSWER]}))
    assert found.messages[0]["content"] == "what is <image>"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (asked({"type": "image", "image": "no.png"}), "no.png' cannot be read: No such file"),
        (asked({"type": "image", "image": "rows.jsonl"}), "rows.jsonl' is not an image"),
        (asked({"type": "image", "image": "http://a.b/c.png"}), "is not in a file: download it"),
        (asked({"type": "image", "image": "data:image/png,abc"}), "not in base64"),
        (asked({"type": "image", "image": 3}), "found int"),
        (asked(LISTED), "more places for images than the 0"),
        ({**asked(A), "images": ["b.png"]}, "no place in them"),
        ({**asked(LISTED), "images": ["a.png", "b.png"]}, "2 images beside the messages, and 1 places"),
        (asked(A, text("a"), text("b")), "side by side"),
        (asked(A, {"type": "audio"}), "part of type 'audio'"),
        ({"messages": [{"role": "user", "content": "see"}, {"role": "assistant", "content": [A]}]}, "users' images"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], reason: str, folder: Path) -> None:
    path = write(folder, row, asked(A, text("see")))
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{reason}"):
        list(read_conversations(path))
    reports: list[str] = []
    assert len(list(read_conversations(path, on_bad_line="skip", report=reports.append))) == 1
    assert len(reports) == 1


# ---- encoding


def supervised(target: Target, example: Example) -> str:
    return str(target.tokenizer.decode([i for i, d in zip(example.inputs.ids, example.drafted) if d]))


def test_placeholders_are_context_and_the_answers_supervised(target: Target, folder: Path) -> None:
    """Images in the first and in the last turn; one sequence holds both answers."""
    more = [{"role": "user", "content": [text("and "), B]}, {"role": "assistant", "content": "dog"}]
    row = {"messages": [{"role": "user", "content": [A, text("see")]}, ANSWER, *more]}
    (example,) = load_examples(write(folder, row), target.tokenizer, 512, images=target.images)
    assert supervised(target, example) == " cat<|im_end|>og<|im_end|>"
    assert example.inputs.ids.count(target.images.placeholder) == 8
    assert not any(d for i, d in zip(example.inputs.ids, example.drafted) if i == target.images.placeholder)
    assert example.inputs.extras["pixel_values"].shape[0] == 2
    prompt = example.inputs.upto(example.drafted.index(True) - 1)
    assert prompt.ids == prompt_inputs(target.tokenizer, _messages(folder), target.images).ids
    assert prompt.extras["pixel_values"].shape[0] == 1


def _messages(folder: Path) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": Picture.of(folder / "a.png")}, text("see")]}]


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "idefics3"])
def test_tokens_are_the_processors(family: str, folder: Path) -> None:
    target = seeing.target(family)
    (example,) = load_examples(write(folder, asked(A, text("see"), B)), target.tokenizer, 512, images=target.images)
    printed = "<|im_start|>user\n#see#<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
    theirs = seeing.plain(target, printed, seeing.picture(0), seeing.picture(1))
    assert example.inputs.ids == theirs["input_ids"][0].tolist()
    for name, tensor in example.inputs.extras.items():
        torch.testing.assert_close(tensor, theirs[name])
    assert supervised(target, example) == " cat<|im_end|>"


def test_a_question_about_another_picture_opens_another_conversation(target: Target, folder: Path) -> None:
    rows = asked(A, text("see")), asked(B, text("see")), asked(A, text("see"))
    a, b, again = load_examples(write(folder, *rows), target.tokenizer, 512, images=target.images).openings.tolist()
    assert a == again != b


def test_rows_that_cannot_be_encoded_are_named(target: Target, folder: Path) -> None:
    noise = seeing.picture(0, 64, 64).source
    (folder / "half.png").write_bytes(noise[: len(noise) // 2])
    rows = [
        asked({"type": "image", "image": "half.png"}),
        {"messages": [{"role": "user", "content": "what is <image>"}, ANSWER]},
        asked(A, text("<image>")),
        asked(A, text("long " * 30)),
        {"messages": [asked(A)["messages"][0], {"role": "assistant", "content": "what <image>"}]},
        {"prompt_ids": [40, target.images.placeholder], "response_ids": [41, 42]},
        {"prompt_ids": [40], "response_ids": [41, target.images.placeholder]},
        asked(A, text("see")),
    ]
    reports: list[str] = []
    found = list(encoded(write(folder, *rows), target.tokenizer, 100, "skip", reports.append, images=target.images))
    assert [conversation.where.rpartition(":")[2] for conversation, _ in found] == ["8"]
    reasons = ["cannot be decoded", "1 of <image>", "2 of <image>", "too long", "2 of <image>"]
    reasons += ["1 image tokens", "the answer holds an image token"]
    for number, (report, reason) in enumerate(zip(reports, reasons, strict=True), start=1):
        assert f":{number}: " in report and reason in report


def test_a_target_of_text_refuses_images(tiny_target: Target, folder: Path) -> None:
    with pytest.raises(DataError, match="this target reads none"):
        load_examples(write(folder, asked(A, text("see"))), tiny_target.tokenizer, 512)


def test_pictures_are_decoded_when_they_are_needed(target: Target, folder: Path) -> None:
    (example,) = load_examples(write(folder, asked(A, text("see"))), target.tokenizer, 512, images=target.images)
    target.images._kept.clear()
    (folder / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png' cannot be read again"):
        dict(example.inputs.extras)


def test_answers_about_images_are_regenerated(target: Target, folder: Path) -> None:
    """The records are read again, from another folder, with the tokens that the target read and wrote."""
    path = write(folder, {**asked(A, text("see")), "id": "one"}, asked({"type": "image", "image": url(1)}, text("see")))
    out = folder / "elsewhere" / "text.jsonl"
    texts = list(read_conversations(path, need_answer=False))
    options = {"max_new_tokens": 12, "temperature": 1.0, "progress": False}
    assert regenerate(TargetTeacher(target, 2), texts, out, **options).written == 2
    assert regenerate(TargetTeacher(target, 2), texts, out, **options).written == 2
    found = list(encoded(out, target.tokenizer, 512, images=target.images))
    assert [picture.digest for text, _ in found for picture in pictures_of(text.messages)] == [
        seeing.picture(n).digest for n in (0, 1)
    ]
    for conversation, (example,) in found:
        assert example.inputs.ids == [*conversation.prompt_ids, *conversation.response_ids]
        assert "pixel_values" in example.inputs.extras
