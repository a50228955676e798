"""Images in the inputs of a target: their placeholder tokens, positions and pixel values.

A chat template prints one marker for an image. The target's processor writes a block of placeholder tokens in its
place, as many as the vision tower gives vectors, and makes pixel values of the image. Targets with M-RoPE also place
the tokens of an image by its grid.

Image processors run on PIL and NumPy. transformers' own loader of processors wants torchvision, for videos; here a
processor is put together without its part for videos.

Legend: N tokens, R rows of positions.
"""

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    PROCESSOR_MAPPING,
    AutoImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from vsd.errors import DataError, TargetError
from vsd.targets.inputs import Inputs, Lazy

_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # outputs of a processor for the text
_GRID = "image_grid_thw"
_REMEMBERED = 256  # images whose placeholders are kept
_MEMORY = 256 << 20  # bytes of pixel values that are kept: a step reads those of its batch several times


class Picture(NamedTuple):
    """An image that is decoded when it is needed.

    Attributes:
        source: path of the file, or its content.
        digest: of the content.
        name: for messages to the user.
    """

    source: Path | bytes
    digest: str
    name: str

    @classmethod
    def of(cls, source: Path | bytes, name: str = "") -> "Picture":
        """The image in a file, or with a file's content; its head is read, not its pixels.

        Raises:
            DataError: there is no such file, it is not an image, or an image too large to decode.
        """
        name = name or f"image '{source}'" if isinstance(source, Path) else name or "image"
        try:
            content = source.read_bytes() if isinstance(source, Path) else source
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror or error}") from error
        _opened(content, name)
        return cls(source, hashlib.sha256(content).hexdigest(), name)

    def content(self) -> bytes:
        """The file's content.

        Raises:
            DataError: the file has gone, or has changed.
        """
        try:
            content = self.source.read_bytes() if isinstance(self.source, Path) else self.source
        except OSError as error:
            raise DataError(f"{self.name} cannot be read again: {error.strerror or error}") from error
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise DataError(f"{self.name} has changed since it was first read")
        return content

    def decoded(self) -> Image.Image:
        """The image in RGB, upright, transparent places white, as servers prepare it.

        Raises:
            DataError: the file has gone, has changed, or is damaged.
        """
        try:
            image = ImageOps.exif_transpose(_opened(self.content(), self.name))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{self.name} cannot be decoded: {str(error) or type(error).__name__}") from error


def _opened(content: bytes, name: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(content))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise DataError(f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels: make it smaller") from error
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{name} is not an image that can be read") from error


class _Look(NamedTuple):
    """What the text around an image needs: its block, the number of placeholders in it, and the image's grid."""

    block: str
    tokens: int
    grid: Tensor | None


class ImageReader:
    """Reads images for one target.

    Args:
        processor: the target's.
        config: the target's, with that of the vision tower.

    Attributes:
        marker: what a chat template prints for an image.
        placeholder: the token whose embedding a vector of the vision tower replaces.
    """

    def __init__(self, processor: Any, config: Any) -> None:
        self.processor, self.config = processor, config
        self.marker: str = getattr(processor, "boi_token", None) or processor.image_token
        self.placeholder: int = config.image_token_id
        self.settings = hashlib.sha256(processor.image_processor.to_json_string().encode()).digest()
        self._looks: dict[str, _Look] = {}
        self._kept: dict[bytes, dict[str, Tensor]] = {}

    def expand(self, text: str, pictures: Sequence[Picture]) -> str:
        """A chat template's text with the block of every picture in place of its marker.

        Raises:
            DataError: there are more or fewer markers than pictures; a picture cannot be decoded.
        """
        first, *rest = text.split(self.marker)
        if len(rest) != len(pictures):
            raise DataError(
                f"{len(rest)} of {self.marker} in the chat template's text and {len(pictures)} images: "
                "the text must not hold the marker itself, nor the template leave out an image"
            )
        return first + "".join(self._look(picture).block + part for picture, part in zip(pictures, rest))

    def inputs(self, ids: list[int], pictures: Sequence[Picture]) -> Inputs:
        """The inputs with tokens `ids`, which hold the blocks of all pictures in order.

        Raises:
            DataError: they do not; a picture cannot be decoded.
        """
        places = [i for i, token in enumerate(ids) if token == self.placeholder]
        looks = [self._look(picture) for picture in pictures]
        if len(places) != sum(look.tokens for look in looks):
            raise DataError(
                f"{len(places)} image tokens, and images of {sum(look.tokens for look in looks)}: "
                "text must not hold image tokens"
            )
        if not pictures:
            return Inputs(ids)
        before = [sum(look.tokens for look in looks[:i]) for i in range(len(looks))]
        starts = tuple(places[n] for n in before)
        return Inputs(ids, self._positions(ids, looks), Lazy(tuple(pictures), starts, self._pixels, self._digest))

    def _look(self, picture: Picture) -> _Look:
        if picture.digest not in self._looks:
            if len(self._looks) == _REMEMBERED:
                self._looks.clear()
            self._looks[picture.digest] = self._looked(picture)
        return self._looks[picture.digest]

    def _looked(self, picture: Picture) -> _Look:
        found = self._processed((picture,))
        ids, tokenizer = found["input_ids"][0].tolist(), self.processor.tokenizer
        block = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(block, add_special_tokens=False)["input_ids"] != ids:
            raise TargetError(f"the image tokens of {type(self.processor).__name__} cannot be written as text")
        return _Look(block, ids.count(self.placeholder), found.get(_GRID))

    def _pixels(self, pictures: tuple[Picture, ...]) -> dict[str, Tensor]:
        """Arguments of the model's `forward` for some pictures."""
        key = self._digest(pictures)
        if key not in self._kept:
            found = self._processed(pictures)
            self._kept[key] = {name: tensor for name, tensor in found.items() if name not in _TEXT}
            self._evict()
        return self._kept[key]

    def _evict(self) -> None:
        """Forget the oldest pixel values above the memory limit, but not the newest ones."""
        sizes = {key: sum(tensor.nbytes for tensor in kept.values()) for key, kept in self._kept.items()}
        excess = sum(sizes.values()) - _MEMORY
        for key in list(sizes)[:-1]:
            if excess > 0:
                excess -= sizes[key]
                del self._kept[key]

    def _digest(self, pictures: tuple[Picture, ...]) -> bytes:
        return self.settings + "".join(picture.digest for picture in pictures).encode()

    def _processed(self, pictures: tuple[Picture, ...]) -> Mapping[str, Any]:
        images, text = [picture.decoded() for picture in pictures], self.marker * len(pictures)
        try:
            found: Mapping[str, Any] = self.processor(
                images=images, text=[text], add_special_tokens=False, return_tensors="pt"
            )
        except (OSError, ValueError) as error:  # a size that the processor refuses
            names = ", ".join(picture.name for picture in pictures)
            raise DataError(f"the target's processor refuses {names}: {' '.join(str(error).split())}") from error
        return found

    def _positions(self, ids: list[int], looks: list[_Look]) -> Tensor | None:
        """Positions [R, N] in which the tokens of an image have places in its grid; None for plain ones."""
        grids = [look.grid for look in looks if look.grid is not None]
        kind: Any = MODEL_MAPPING.get(type(self.config), None)
        if not grids or not hasattr(kind, "get_rope_index"):
            return None
        shell = kind.__new__(kind)  # the rule needs the configuration alone: no weights are made
        nn.Module.__init__(shell)
        shell.config = self.config
        tokens = torch.tensor([ids])
        types = (tokens == self.placeholder).int()
        positions, _ = shell.get_rope_index(input_ids=tokens, mm_token_type_ids=types, image_grid_thw=torch.cat(grids))
        return torch.as_tensor(positions)[:, 0]


def reads_images(config: PreTrainedConfig) -> bool:
    """Whether the target with this configuration reads images."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "vision_config")


def image_reader(
    path: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> ImageReader | None:
    """The reader of a target's images, whose chat template becomes the tokenizer's; None for a target of text.

    Args:
        path: folder or hub id.
        options: of `from_pretrained`.

    Raises:
        TargetError: the processor cannot be loaded.
    """
    if not reads_images(config):
        return None
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None:
        raise TargetError(f"'{path}' reads images, and transformers has no processor for {config.model_type}")
    images = AutoImageProcessor.from_pretrained(path, backend="pil", **options)
    settings, _ = kind.get_processor_dict(path, **options)
    processor = put_together(kind, images, tokenizer, settings)
    tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
    return ImageReader(processor, config)


def put_together(
    kind: type[ProcessorMixin], images: Any, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> ProcessorMixin:
    """A processor of a class without its part for videos.

    Args:
        images: its image processor.
        settings: content of processor_config.json.

    Raises:
        TargetError: a package that the class needs is not installed.
    """

    class Imaging(kind):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    parts = {"image_processor": images, "tokenizer": tokenizer}
    try:
        processor: Any = Imaging.from_args_and_dict([parts.get(name) for name in kind.get_attributes()], settings)
    except (ImportError, TypeError, ValueError, OSError) as error:
        raise TargetError(f"cannot load the target's {kind.__name__}: {' '.join(str(error).split())}") from error
    processor.__class__ = kind  # a local class could not be sent to workers that load data
    made: ProcessorMixin = processor
    return made
