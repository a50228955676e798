"""How often the embedded multimodal target is right about pictures of another program: the test pictures of easy-vqa.

    pip install --no-deps easy-vqa
    python tools/measure_easy_vqa.py --pictures 100

One coloured shape on a plain ground, 64 pixels wide; no such picture was trained on. Every picture is asked one
question about its shape and one about its color, in the words of easy-vqa, and so is a blank picture. Answers are
greedy; one is right if it has the fact and none of its alternatives. Intervals are 95 % (bootstrap over pictures).
"""

import argparse
from collections import defaultdict

from PIL import Image

from measure_multimodal_target import BLANK, Target, interval, right
from vsd.pictures import Question
from vsd.targets.load import resolve

FACTS = {
    "shape": ("circle", "rectangle", "triangle"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}


def asked_of(pictures: int) -> list[tuple[int, Question]]:
    """The first question about the shape and the first about the color of every picture that has both."""
    import easy_vqa

    firsts: dict[int, dict[str, Question]] = defaultdict(dict)
    for text, answer, number in zip(*easy_vqa.get_test_questions()):
        about = next((about for about, facts in FACTS.items() if answer in facts), None)
        if about is not None:  # else it is answered by yes or no
            wrong = tuple(fact for fact in FACTS[about] if fact != answer)
            firsts[number].setdefault(about, Question(about, text, answer, (answer,), wrong))
    whole = sorted(number for number, found in firsts.items() if found.keys() == FACTS.keys())[:pictures]
    return [(number, question) for number in whole for question in firsts[number].values()]


def main() -> None:
    """Measure, and print one line for each kind of fact."""
    import easy_vqa

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--target", default="smollm2-135m-vision", help="name or folder")
    options = parser.parse_args()
    target, asked = Target(resolve(options.target)), asked_of(options.pictures)
    paths = easy_vqa.get_test_image_paths()
    ways = {"picture": [Image.open(paths[n]).convert("RGB") for n, _ in asked], "blank": [BLANK] * len(asked)}
    answers = {way: target.answers([q.text for _, q in asked], images) for way, images in ways.items()}
    for about in FACTS:
        line = f"{about:6}"
        for way, said in answers.items():
            hits = [float(right(q, said[k])) for k, (_, q) in enumerate(asked) if q.about == about]
            mean, low, high = interval(hits)
            line += f"   {way} {mean:.2f} [{low:.2f}, {high:.2f}] n {len(hits)}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
