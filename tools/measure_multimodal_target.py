"""How often the embedded multimodal target names what held-out pictures show, against a blank picture.

    python tools/measure_multimodal_target.py --read 300 --pictures 40

First table, without the language model: the share of a caption's words of each kind that are the nearest words to the
picture's embeddings. Second table: every picture is asked for an object, a colour, a place, the count and the
background; the answers are greedy. An answer is right if it has the words of the fact and none of its alternatives.
Compared are answers behind the picture, behind a blank picture (gray everywhere), and of the language model alone, told
the caption in words: what the frozen language model makes of perfect sight. Intervals are 95 % (bootstrap over
pictures).
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from eye import Words
from vsd.pictures import SIDE, Question, Scene, caption, questions, render, scene
from vsd.pictures.scenes import COLOURS, COLUMNS, GROUNDS, NUMBERS, ROWS, SHAPES, WORDS
from vsd.targets.load import resolve

BLANK = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
ABOUT = ("object", "color", "place", "count", "ground")
HELD_OUT = 500_000  # first seed: training begins far above
_OPENING = 10  # words of a caption before its things
_TOGETHER = 20
_LONGEST = 16  # tokens of an answer
_DRAWS = 2000


class Target:
    """The model and its processor; answers questions about pictures, or about captions."""

    def __init__(self, folder: str) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def answers(self, asked: Sequence[str], images: Sequence[Image.Image | str]) -> list[str]:
        """Greedy answers; a string instead of an image is a caption in its place."""
        found: list[str] = []
        for start in range(0, len(asked), _TOGETHER):
            rows = slice(start, start + _TOGETHER)
            found += self._answers(asked[rows], images[rows])
        return found

    def _answers(self, asked: Sequence[str], images: Sequence[Image.Image | str]) -> list[str]:
        texts = [self._prompt(question, image) for question, image in zip(asked, images)]
        pixels = [image for image in images if not isinstance(image, str)]
        batch = self.processor(
            images=pixels or None, text=texts, return_tensors="pt", padding=True, padding_side="left"
        )
        found = self.model.generate(**batch, max_new_tokens=_LONGEST, do_sample=False)
        new = found[:, batch["input_ids"].shape[1] :]
        decoded: list[str] = self.processor.batch_decode(new, skip_special_tokens=True)
        return decoded

    def _prompt(self, question: str, image: Image.Image | str) -> str:
        told = [{"type": "text", "text": f"{image}\n"}] if isinstance(image, str) else [{"type": "image"}]
        messages = [{"role": "user", "content": [*told, {"type": "text", "text": question}]}]
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return text


@torch.no_grad()
def read(target: Target, scenes: Sequence[Scene], images: Sequence[Image.Image]) -> dict[str, list[float]]:
    """The share of words of every kind that are right in each picture, by the word that an embedding is nearest to."""
    words = Words(target.processor.tokenizer)
    vocabulary = target.model.get_input_embeddings().weight[words.ids]  # [W, h]
    pixels = target.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    seen = torch.stack(list(target.model.get_image_features(pixels).pooler_output))  # [B, P, h]
    nearest = torch.cdist(seen, vocabulary).argmin(-1)  # [B, P]
    names = [target.processor.tokenizer.decode([number]).strip() for number in words.ids]
    found: dict[str, list[float]] = {about: [] for about in ABOUT}
    for one, row in zip(scenes, nearest.tolist()):
        hits: dict[str, list[bool]] = {about: [] for about in ABOUT}
        for position, (true, near) in enumerate(zip(words.of(caption(one)), row)):
            if about := kind_of(names[true], position):
                hits[about].append(true == near)
        for about, values in hits.items():
            found[about] += [sum(values) / len(values)]
    return found


def kind_of(word: str, position: int) -> str | None:
    """What a word of a caption is about."""
    if position < _OPENING:
        return "count" if word in NUMBERS else "ground" if word in GROUNDS else None
    kinds = {"color": tuple(COLOURS), "place": ROWS + COLUMNS, "object": SHAPES + NUMBERS + WORDS}
    return next((about for about, words in kinds.items() if word in words), None)


def right(question: Question, answer: str) -> bool:
    """Whether an answer names the fact and no alternative; digits count as words."""
    found = re.findall(r"[a-z]+|[0-9]+", answer.lower())
    words = {NUMBERS[int(word)] if word.isdigit() and int(word) < len(NUMBERS) else word for word in found}
    return words.issuperset(question.facts) and words.isdisjoint(question.wrong)


def asked_of(pictures: int) -> Iterator[tuple[int, Question]]:
    """One question of each kind about every picture that has one."""
    for seed in range(HELD_OUT, HELD_OUT + pictures):
        firsts: dict[str, Question] = {}
        for question in questions(scene(seed)):
            firsts.setdefault(question.about, question)
        yield from ((seed, question) for question in firsts.values())


def interval(hits: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval."""
    values = np.asarray(hits, dtype=float)
    draws = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def print_table(title: str, columns: dict[str, dict[str, list[float]]]) -> None:
    """Means and intervals of every kind of fact (rows) in every way of showing it (columns)."""
    print(title)
    for about in ABOUT:
        print_row(f"  {about:8}", {way: found[about] for way, found in columns.items()})


def print_row(label: str, hits: dict[str, list[float]]) -> None:
    """Mean and interval of one kind of fact in every way of showing it."""
    for way, values in hits.items():
        mean, low, high = interval(values)
        label += f"   {way} {mean:.2f} [{low:.2f}, {high:.2f}] n {len(values)}"
    print(label, flush=True)


def answered(target: Target, pictures: int, report: Path | None) -> dict[str, dict[str, list[float]]]:
    """Whether the answers are right, by way of showing and kind of fact; all answers go to `report`."""
    rows = list(asked_of(pictures))
    scenes = [scene(seed) for seed, _ in rows]
    ways: dict[str, list[Image.Image | str]] = {
        "picture": [render(one) for one in scenes],
        "blank": [BLANK] * len(rows),
        "caption": [caption(one) for one in scenes],
    }
    answers = {way: target.answers([q.text for _, q in rows], images) for way, images in ways.items()}
    if report:
        said = [{"question": q.text, **{way: answers[way][k] for way in ways}} for k, (_, q) in enumerate(rows)]
        report.write_text(json.dumps(said, indent=1))
    return {
        way: {about: [float(right(q, said[k])) for k, (_, q) in enumerate(rows) if q.about == about] for about in ABOUT}
        for way, said in answers.items()
    }


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", type=int, default=300, help="pictures of the first table")
    parser.add_argument("--pictures", type=int, default=40, help="pictures of the second table; 0: none")
    parser.add_argument("--target", default="smollm2-135m-vision", help="name or folder")
    parser.add_argument("--json", type=Path, help="also write all answers there")
    options = parser.parse_args()
    target = Target(resolve(options.target))
    scenes = [scene(seed) for seed in range(HELD_OUT, HELD_OUT + options.read)]
    blank = read(target, scenes, [BLANK] * len(scenes))
    columns = {"picture": read(target, scenes, [render(one) for one in scenes]), "blank": blank}
    print_table("Words that image embeddings are nearest to", columns)
    if options.pictures:
        print_table("Answers", answered(target, options.pictures, options.json))


if __name__ == "__main__":
    main()
