"""Images in the messages of a row.

A user's message has an image as a part of its content, or as `<image>` in its text:

    {"type": "image_url", "image_url": {"url": "…"}}     OpenAI
    {"type": "image", "image": "…"}                      also with "path" or "url" in place of "image"
    {"type": "image"}, or <image> in the text            the next one of the row's field "image" or "images" (LLaVA)

An image is a path relative to the file of the row, a data URL, or an http URL, which is downloaded on request alone.
Columns of images of the Hugging Face hub are read, too. If a row lists images and its messages have no places for them,
they stand before the text of the first question. Files are decoded when they are needed: only their heads are read
here.
"""

import base64
import binascii
import io
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

from vsd.data.lines import BadLineError
from vsd.errors import DataError
from vsd.targets.images import Picture

Part = dict[str, Any]  # {"type": "text", "text": …} or {"type": "image", "image": Picture}

MARK = "<image>"  # in a text: the place of one of the row's images
_KINDS = ("image", "image_url")
_PLACES = ("image_url", "image", "path", "url")
_SECONDS = 30
_BYTES = 64 << 20


class Album:
    """The images of one row.

    Args:
        row: its field "image" or "images" lists images whose places are in the text.
        folder: relative paths start there.
        download: whether images are fetched from http URLs.
    """

    def __init__(self, row: dict[str, Any], folder: Path, *, download: bool = False) -> None:
        given = row.get("images") if row.get("images") is not None else row.get("image")
        self.listed: list[Any] = [] if given is None else given if isinstance(given, list) else [given]
        self.folder, self.download, self.taken = folder, download, 0

    def parts(self, content: Any) -> list[Part] | None:
        """The parts of a content that has images; None for one that has none.

        Raises:
            BadLineError: an image that cannot be read, or parts that cannot be used.
        """
        raw = _at_marks(content) if isinstance(content, str) and self.listed else content
        if not isinstance(raw, list) or not any(_is_image(part) for part in raw):
            return None
        parts = [self._image(part) if _is_image(part) else _text(part) for part in raw]
        kinds = [part["type"] for part in parts]
        if ("text", "text") in pairwise(kinds):
            raise BadLineError("a message has text parts side by side, which servers join in different ways: join them")
        return parts

    def rest(self) -> list[Part]:
        """Listed images that no message has a place for.

        Raises:
            BadLineError: some have one, others have none.
        """
        if 0 < self.taken < len(self.listed):
            raise BadLineError(f"{len(self.listed)} images beside the messages, and {self.taken} places for them")
        return [self._image({"type": "image"}) for _ in self.listed[self.taken :]]

    def _image(self, part: Part) -> Part:
        source = next((part[key] for key in _PLACES if part.get(key) is not None), None)
        if source is None:
            if self.taken == len(self.listed):
                raise BadLineError(f"more places for images than the {len(self.listed)} that the row lists")
            source = self.listed[self.taken]
            self.taken += 1
        try:
            return {"type": "image", "image": self._picture(source)}
        except DataError as error:
            raise BadLineError(str(error)) from error

    def _picture(self, source: Any) -> Picture:
        if isinstance(source, dict):  # an OpenAI URL; an image of a table, with its content or its path
            source = next((source[key] for key in ("url", "bytes", "path") if source.get(key) is not None), None)
        if isinstance(source, bytes):
            return Picture.of(source)
        if hasattr(source, "save"):  # decoded by `datasets`
            file = io.BytesIO()
            source.save(file, "PNG")
            return Picture.of(file.getvalue())
        if not isinstance(source, str) or not source:
            raise DataError(f"an image must be a path or a URL, found {type(source).__name__}")
        if source.startswith("data:"):
            return Picture.of(_decoded(source))
        if source.startswith(("http://", "https://")):
            return Picture.of(self._downloaded(source), f"image '{source}'")
        return Picture.of((self.folder / source.removeprefix("file://")).absolute())

    def _downloaded(self, url: str) -> bytes:
        if not self.download:
            raise DataError(f"image '{url}' is not in a file: download it (vsd train does so with --download-images)")
        try:
            with urllib.request.urlopen(url, timeout=_SECONDS) as reply:
                content: bytes = reply.read(_BYTES + 1)
        except (OSError, ValueError) as error:
            raise DataError(f"image '{url}' cannot be downloaded: {error}") from error
        if len(content) > _BYTES:
            raise DataError(f"image '{url}' has more than {_BYTES >> 20} MB")
        return content


def text_of(content: Any) -> str:
    """The text of a message's content, without its images."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def pictures_of(messages: list[dict[str, Any]]) -> list[Picture]:
    """The images of messages, in their order."""
    contents = (message["content"] for message in messages if isinstance(message["content"], list))
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


def as_json(value: Any) -> Any:
    """Messages or contents with every image as its path, or as a data URL."""
    if isinstance(value, Picture):
        return str(value.source) if isinstance(value.source, Path) else _data_url(value.source)
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list) else value


def as_request(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a request to OpenAI's API has them: images as data URLs.

    Raises:
        DataError: the file of an image is gone.
    """

    def part(given: Part) -> Part:
        if given["type"] != "image":
            return given
        return {"type": "image_url", "image_url": {"url": _data_url(given["image"].content())}}

    contents = ((message, message["content"]) for message in messages)
    return [
        {**message, "content": [part(one) for one in content]} if isinstance(content, list) else message
        for message, content in contents
    ]


def _data_url(content: bytes) -> str:
    return f"data:image/*;base64,{base64.b64encode(content).decode()}"


def _at_marks(text: str) -> list[Part]:
    """Text and places of images, without the line breaks between both."""
    first, *others = text.split(MARK)
    parts: list[Part] = [{"type": "text", "text": first}]
    for other in others:
        parts += [{"type": "image"}, {"type": "text", "text": other}]
    texts = ({**part, "text": part["text"].strip("\n")} if "text" in part else part for part in parts)
    return [part for part in texts if part.get("text", "image").strip()]


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _KINDS


def _text(part: Any) -> Part:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise BadLineError(f"a message has a part of type {kind!r}: only text and images can be trained on")
    return {"type": "text", "text": part["text"]}


def _decoded(url: str) -> bytes:
    head, _, data = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise DataError("a data URL is not in base64") from error
