"""Prompts about pictures for the embedded multimodal target: rendered scenes, and questions with long answers.

    python benchmarks/pictures.py --out runs/pictures [--train 400] [--test 48]

Writes train.jsonl and test.jsonl, with the pictures beside them. The scenes of both files are other ones than those
that the target's vision tower learned from; the questions of test.jsonl are not among those of train.jsonl.
"""

import argparse
import json
from pathlib import Path

from vsd.pictures import render, scene

QUESTIONS = {
    "train": (
        "Describe this picture in detail.",
        "Write a short story about what you see.",
        "What could this picture be used for? Give three ideas and explain each.",
        "Explain to a child what is in the picture.",
        "List everything in the picture and say where it is.",
        "How would you draw this picture, step by step?",
        "Write a short poem about this picture.",
        "What is special about the colors of this picture? Explain in a few sentences.",
    ),
    "test": (
        "Tell me in a few sentences what this picture shows.",
        "Invent a fable that begins with this picture.",
        "Write instructions so that somebody who cannot see the picture can paint it.",
        "Write an advertisement that uses this picture.",
    ),
}
FIRST = {"train": 1_000_000, "test": 2_000_000}  # seeds of scenes


def write(part: str, count: int, out: Path) -> Path:
    """`out`/`part`.jsonl with `count` prompts, and the pictures."""
    folder, path, questions = out / part, out / f"{part}.jsonl", QUESTIONS[part]
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for n in range(count):
            picture = folder / f"{n}.png"
            render(scene(FIRST[part] + n)).save(picture)
            image = {"type": "image_url", "image_url": {"url": f"{part}/{picture.name}"}}
            content = [image, {"type": "text", "text": questions[n % len(questions)]}]
            row = {"id": f"{part}-{n}", "messages": [{"role": "user", "content": content}]}
            file.write(json.dumps(row) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--train", type=int, default=400, help="prompts of train.jsonl")
    parser.add_argument("--test", type=int, default=48, help="prompts of test.jsonl")
    a = parser.parse_args()
    for part, count in {"train": a.train, "test": a.test}.items():
        print(write(part, count, a.out))


if __name__ == "__main__":
    main()
