"""Scenes of coloured shapes, numbers and words on plain and patterned grounds: pixels, caption, questions, answers.

A scene is a function of its seed. It has one to three things in different cells of a grid of three rows and columns.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin

from PIL import Image, ImageDraw, ImageFont

SIDE = 96  # pixels of a picture's side
_FINE = 2  # drawn so many times larger, then averaged

COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 150, 55),
    "blue": (45, 75, 220),
    "yellow": (245, 220, 50),
    "orange": (245, 140, 30),
    "purple": (130, 45, 165),
    "pink": (250, 160, 195),
    "brown": (120, 75, 40),
    "black": (15, 15, 15),
    "white": (248, 248, 248),
    "gray": (140, 140, 140),
}
GROUNDS = ("white", "black", "gray", "blue", "green", "yellow", "pink")
PATTERNS = ("plain", "striped", "dotted", "checked")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("sun", "cat", "dog", "key", "map", "bus")
SIZES = {"small": (6.5, 8.0), "large": (11.5, 13.0)}  # half the extent, in pixels
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
MOST = 3  # things of a scene
_JITTER = 2.0  # pixels between a thing's centre and its cell's, at most

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.

    Attributes:
        kind: "shape", "number" or "word".
        what: the shape, the number in words, or the word.
        rgb: the colour as drawn; `colour` is its name.
        half: half its extent in pixels; `size` is "small" or "large".
        row, column: of its cell; `x`, `y` is its centre in pixels.
    """

    kind: str
    what: str
    colour: str
    rgb: Colour
    size: str
    half: float
    row: int
    column: int
    x: float
    y: float

    @property
    def noun(self) -> str:
        """What it is called: "circle", "written seven", "written sun"."""
        return self.what if self.kind == "shape" else f"written {self.what}"

    @property
    def look(self) -> str:
        """What it looks like: "large red circle"; "written red seven", as numbers and words are of one size."""
        return f"{self.size if self.kind == 'shape' else 'written'} {self.colour} {self.what}"

    @property
    def place(self) -> str:
        """Its cell, as "top left"."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """Things in reading order on a ground of one colour, with a pattern in two shades of it."""

    things: tuple[Thing, ...]
    ground: str
    pattern: str
    shades: tuple[Colour, Colour]
    period: float


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        about: "object", "color", "place", "count" or "ground".
        facts: words that a right answer has.
        wrong: words that it has not: the alternatives to `facts`.
    """

    about: str
    text: str
    answer: str
    facts: tuple[str, ...]
    wrong: tuple[str, ...]


def scene(seed: int, least: int = 1, most: int = MOST) -> Scene:
    """The scene of that seed, of `least` to `most` things."""
    draw = random.Random(seed)
    ground = draw.choice(GROUNDS)
    base = _near(draw, COLOURS[ground])
    step = draw.choice((-1, 1)) if 60 < sum(base) / 3 < 195 else (1 if sum(base) / 3 < 100 else -1)
    shades = base, _shifted(base, step * draw.randint(28, 45))
    cells = sorted(draw.sample(range(9), draw.randint(least, most)))
    colours = [name for name in COLOURS if name != ground]
    things = tuple(_thing(draw, cell, draw.choice(colours)) for cell in cells)
    return Scene(things, ground, draw.choice(PATTERNS), shades, draw.uniform(8, 13))


def _thing(draw: random.Random, cell: int, colour: str) -> Thing:
    kind = draw.choices(("shape", "number", "word"), (6, 2, 2))[0]
    what = draw.choice({"shape": SHAPES, "number": NUMBERS, "word": WORDS}[kind])
    size = draw.choice(tuple(SIZES)) if kind == "shape" else "large"  # to be read
    row, column = divmod(cell, 3)
    x, y = ((place + 0.5) * SIDE / 3 + draw.uniform(-_JITTER, _JITTER) for place in (column, row))
    half = draw.uniform(*SIZES[size])
    return Thing(kind, what, colour, _near(draw, COLOURS[colour]), size, half, row, column, x, y)


def _near(draw: random.Random, colour: Colour) -> Colour:
    r, g, b = (min(255, max(0, c + draw.randint(-10, 10))) for c in colour)
    return r, g, b


def _shifted(colour: Colour, by: int) -> Colour:
    r, g, b = (min(255, max(0, c + by)) for c in colour)
    return r, g, b


def caption(scene: Scene) -> str:
    """All that is true of the scene, in words."""
    count = len(scene.things)
    start = "There is one object" if count == 1 else f"There are {NUMBERS[count]} objects"
    listed = ",".join(f" a {thing.look} at {thing.place}" for thing in scene.things)
    return f"{start} on a {scene.pattern} {scene.ground} background:{listed}."


def questions(scene: Scene) -> list[Question]:
    """What can be asked about the scene and has one answer."""
    count = NUMBERS[len(scene.things)]
    many = "is one object" if count == "one" else f"are {count} objects"
    ground = f"The background is {scene.pattern} {scene.ground}."
    asked = [
        Question("count", "How many objects are there?", f"There {many}.", (count,), others(NUMBERS[1:7], count)),
        Question("ground", "What is the background?", ground, (scene.ground,), others(GROUNDS, scene.ground)),
    ]
    for thing in scene.things:
        asked += _about(thing, alone=sum(other.noun == thing.noun for other in scene.things) == 1)
    return asked


def _about(thing: Thing, alone: bool) -> list[Question]:
    name = thing.noun
    whats = others(SHAPES + WORDS + NUMBERS, thing.what)
    asked = [Question("object", f"What is at the {thing.place}?", f"A {thing.look}.", (thing.what,), whats)]
    if alone:
        row, column = ROWS[thing.row], COLUMNS[thing.column]
        places = others(ROWS, row) + others(COLUMNS, column)
        colours = others(tuple(COLOURS), thing.colour)
        asked += [
            Question("color", f"What color is the {name}?", f"The {name} is {thing.colour}.", (thing.colour,), colours),
            Question("place", f"Where is the {name}?", f"The {name} is at the {thing.place}.", (row, column), places),
        ]
    return asked


def others(words: tuple[str, ...], word: str) -> tuple[str, ...]:
    """The alternatives to a word."""
    return tuple(other for other in words if other != word)


def render(scene: Scene) -> Image.Image:
    """The picture, SIDE × SIDE, RGB."""
    image = Image.new("RGB", (SIDE * _FINE, SIDE * _FINE), scene.shades[0])
    canvas = ImageDraw.Draw(image)
    _draw_pattern(canvas, scene)
    for thing in scene.things:
        _draw_thing(canvas, thing)
    return image.reduce(_FINE)


def _draw_pattern(canvas: ImageDraw.ImageDraw, scene: Scene) -> None:
    side, step, shade = SIDE * _FINE, scene.period * _FINE, scene.shades[1]
    starts = [k * step for k in range(int(side / step) + 1)]
    if scene.pattern == "striped":
        for y in starts:
            canvas.rectangle((0, y, side, y + step / 2), shade)
    elif scene.pattern == "dotted":
        for y in starts:
            for x in starts:
                canvas.ellipse((x, y, x + step / 2, y + step / 2), shade)
    elif scene.pattern == "checked":
        for row, y in enumerate(starts):
            for x in starts[row % 2 :: 2]:
                canvas.rectangle((x, y, x + step, y + step), shade)


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, half = thing.x * _FINE, thing.y * _FINE, thing.half * _FINE
    if thing.kind == "number":
        _draw_text(canvas, str(NUMBERS.index(thing.what)), x, y, round(2.6 * half), thing.rgb)
    elif thing.kind == "word":
        _draw_text(canvas, thing.what.upper(), x, y, round(1.2 * half), thing.rgb)
    else:
        _DRAWN[thing.what](canvas, x, y, half, thing.rgb)


def _draw_text(canvas: ImageDraw.ImageDraw, text: str, x: float, y: float, size: int, rgb: Colour) -> None:
    canvas.text((x, y), text, rgb, font=_font(size), anchor="mm", stroke_width=1, stroke_fill=rgb)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _polygon(points: Points) -> Callable[[ImageDraw.ImageDraw, float, float, float, Colour], None]:
    """Draws a polygon of points between -1 and 1."""

    def drawn(canvas: ImageDraw.ImageDraw, x: float, y: float, half: float, rgb: Colour) -> None:
        canvas.polygon([(x + px * half, y + py * half) for px, py in points], rgb)

    return drawn


def _circle(canvas: ImageDraw.ImageDraw, x: float, y: float, half: float, rgb: Colour) -> None:
    canvas.ellipse((x - half, y - half, x + half, y + half), rgb)


def _ring(canvas: ImageDraw.ImageDraw, x: float, y: float, half: float, rgb: Colour) -> None:
    canvas.ellipse((x - half, y - half, x + half, y + half), outline=rgb, width=round(0.36 * half))


def _arc(centre: tuple[float, float], radius: float, start: float, end: float, steps: int = 24) -> Points:
    angles = [start + (end - start) * k / steps for k in range(steps + 1)]
    return [(centre[0] + radius * cos(a), centre[1] + radius * sin(a)) for a in angles]


_STAR = [(r * sin(k * pi / 5), -r * cos(k * pi / 5)) for k, r in enumerate([1, 0.42] * 5)]
_HEART = [*_arc((0.5, -0.4), 0.5, -pi, 0.25 * pi), (0, 0.95), *_arc((-0.5, -0.4), 0.5, 0.75 * pi, 2 * pi)]
_MOON = [*_arc((0, 0), 1, 0.3 * pi, 1.7 * pi), *_arc((0.45, 0), 0.82, 1.55 * pi, 0.45 * pi)]
_CROSS = [
    (a, b)
    for a, b in (
        (-0.33, -1),
        (0.33, -1),
        (0.33, -0.33),
        (1, -0.33),
        (1, 0.33),
        (0.33, 0.33),
        (0.33, 1),
        (-0.33, 1),
        (-0.33, 0.33),
        (-1, 0.33),
        (-1, -0.33),
        (-0.33, -0.33),
    )
]

_DRAWN = {
    "circle": _circle,
    "ring": _ring,
    "square": _polygon([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
    "triangle": _polygon([(0, -0.95), (1, 0.85), (-1, 0.85)]),
    "star": _polygon(_STAR),
    "heart": _polygon(_HEART),
    "cross": _polygon(_CROSS),
    "moon": _polygon(_MOON),
}
