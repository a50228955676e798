"""Pictures of other programs, with what is true of them: the shapes of easy-vqa, and colour emoji of a font.

    pip install --no-deps easy-vqa
    apt install fonts-noto-color-emoji

Shapes have a split into training and test pictures. Emoji are the same in both; sizes, places and grounds differ.
"""

import random
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vsd.pictures import SIDE, Question
from vsd.pictures.scenes import COLOURS, GROUNDS, others

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SHAPE_FACTS = {
    "shape": ("circle", "rectangle", "triangle"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}
_FOOD_AND_PLANTS, _ANIMALS = range(0x1F32D, 0x1F380), range(0x1F400, 0x1F440)  # blocks of Unicode
_LONGEST_NAME = 3  # words
_STRIKE = 109  # the only size that Noto's bitmaps have
_SMALLEST = 40  # pixels of an emoji's side


@dataclass(frozen=True)
class Picture:
    """A picture, a caption in words, and questions with their true answers."""

    image: Image.Image
    caption: str
    questions: list[Question]


class Shapes:
    """The pictures of easy-vqa: one coloured shape on a plain ground, 64 pixels wide; its own questions.

    Args:
        split: "train" (4,000 pictures) or "test" (1,000).
    """

    def __init__(self, split: str) -> None:
        import easy_vqa

        train = split == "train"
        self._paths = easy_vqa.get_train_image_paths() if train else easy_vqa.get_test_image_paths()
        asked = easy_vqa.get_train_questions() if train else easy_vqa.get_test_questions()
        found: dict[int, dict[str, tuple[str, str]]] = defaultdict(dict)
        for text, answer, number in zip(*asked):
            about = next((about for about, facts in SHAPE_FACTS.items() if answer in facts), None)
            if about is not None:  # else it is answered by yes or no
                found[number].setdefault(about, (text, answer))
        self._asked = {number: asked for number, asked in sorted(found.items()) if asked.keys() == SHAPE_FACTS.keys()}
        self.numbers = list(self._asked)

    def picture(self, number: int) -> Picture:
        """The picture of that number, one of `numbers`."""
        asked = self._asked[number]
        shape, color = asked["shape"][1], asked["color"][1]
        said = {"shape": f"A {color} {shape}.", "color": f"The {shape} is {color}."}
        questions = [
            Question(about, text, said[about], (fact,), others(SHAPE_FACTS[about], fact))
            for about, (text, fact) in asked.items()
        ]
        image = Image.open(self._paths[number]).convert("RGB")
        return Picture(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), shape_caption(color, shape), questions)


class Emoji:
    """Animals, food and plants of a colour font, each on a plain ground; a picture is a function of its seed."""

    def __init__(self, font: Path = FONT) -> None:
        drawn = ImageFont.truetype(str(font), _STRIKE)
        characters = [chr(code) for code in (*_FOOD_AND_PLANTS, *_ANIMALS)]
        named = {character: unicodedata.name(character, "").lower() for character in characters}
        self.glyphs = {  # by name in Unicode, those of at most three words
            name: _glyph(drawn, character)
            for character, name in named.items()
            if 0 < len(name.split()) <= _LONGEST_NAME and drawn.getmask(character, "RGBA").getbbox()
        }

    def picture(self, seed: int) -> Picture:
        """The picture of that seed."""
        draw = random.Random(seed)
        name = draw.choice(list(self.glyphs))
        ground, side = draw.choice(GROUNDS), draw.randint(_SMALLEST, SIDE)
        image = Image.new("RGB", (SIDE, SIDE), COLOURS[ground])
        glyph = self.glyphs[name].resize((side, side))
        image.paste(glyph, (draw.randint(0, SIDE - side), draw.randint(0, SIDE - side)), glyph)
        wrong = others(GROUNDS, ground)
        questions = [
            Question("emoji", "What is this emoji called?", f"It is called {name}.", tuple(name.split()), ()),
            Question("ground", "What is the background?", f"The background is plain {ground}.", (ground,), wrong),
        ]
        return Picture(image, emoji_caption(name, ground), questions)


def _glyph(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    side = round(1.25 * _STRIKE)
    image = Image.new("RGBA", (side, side))
    ImageDraw.Draw(image).text((0, 0), character, font=font, embedded_color=True)
    return image.crop(image.getbbox())


def shape_caption(color: str, shape: str) -> str:
    """All that is true of a shape's picture, in words."""
    return f"There is one object on a plain background: a {color} {shape}."


def emoji_caption(name: str, ground: str) -> str:
    """All that is true of an emoji's picture, in words."""
    return f"There is one emoji on a plain {ground} background: {name}."


class RealPictures:
    """Training pictures of both, in turns; a picture is a function of its seed."""

    def __init__(self) -> None:
        self._shapes, self._emoji = Shapes("train"), Emoji()

    def captions(self) -> Iterator[str]:
        """All captions that there are."""
        yield from (shape_caption(color, shape) for color in SHAPE_FACTS["color"] for shape in SHAPE_FACTS["shape"])
        yield from (emoji_caption(name, ground) for name in self._emoji.glyphs for ground in GROUNDS)

    def picture(self, seed: int) -> Picture:
        """A shape for an even seed, an emoji for an odd one."""
        numbers = self._shapes.numbers
        return self._emoji.picture(seed) if seed % 2 else self._shapes.picture(numbers[seed // 2 % len(numbers)])
