"""How often the embedded multimodal target is right about pictures of other programs.

    pip install --no-deps easy-vqa
    apt install fonts-noto-color-emoji
    python tools/measure_real_pictures.py --pictures 100

Test pictures of easy-vqa are asked for their shape and their color, in the words of easy-vqa; emoji, known from
training in other sizes, places and on other grounds, for their name and their background. A blank picture is asked the
same. Answers are greedy; one is right if it has the fact and none of its alternatives. Intervals are 95 % (bootstrap
over pictures).
"""

import argparse

from measure_multimodal_target import BLANK, HELD_OUT, Target, print_row, right
from real_pictures import Emoji, Shapes
from vsd.targets.load import resolve


def main() -> None:
    """Measure, and print one line for each kind of fact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100, help="of each program")
    parser.add_argument("--target", default="smollm2-135m-vision", help="name or folder")
    options = parser.parse_args()
    target, shapes, emoji = Target(resolve(options.target)), Shapes("test"), Emoji()
    shown = {
        "easy-vqa": [shapes.picture(number) for number in shapes.numbers[: options.pictures]],
        "emoji": [emoji.picture(HELD_OUT + k) for k in range(options.pictures)],
    }
    for program, pictures in shown.items():
        asked = [(picture.image, question) for picture in pictures for question in picture.questions]
        ways = {"picture": [image for image, _ in asked], "blank": [BLANK] * len(asked)}
        answers = {way: target.answers([q.text for _, q in asked], images) for way, images in ways.items()}
        for about in dict.fromkeys(question.about for _, question in asked):
            hits = {
                way: [float(right(q, said[k])) for k, (_, q) in enumerate(asked) if q.about == about]
                for way, said in answers.items()
            }
            print_row(f"{program:8} {about:6}", hits)


if __name__ == "__main__":
    main()
