"""What the embedded multimodal target is trained on: everything that can be shown is, about equally often."""

import random
from collections import Counter

from PIL import Image

from make_multimodal_target import LONG, picture_of, question_about
from real_pictures import Picture


class Thirty:
    """Pictures of another program, of thirty kinds; as emoji, they depend on the first draw from their seed."""

    def picture(self, seed: int) -> Picture:
        return Picture(Image.new("RGB", (1, 1)), f"kind {random.Random(seed).randrange(30)}", [])


def test_all_kinds_of_pictures_are_shown() -> None:
    captions = [picture_of(seed, Thirty()).caption for seed in range(3000)]
    real = Counter(caption for caption in captions if caption.startswith("kind"))
    assert len(real) == 30 and 900 < real.total() < 1100
    grounds = Counter(caption.split(" background")[0].split()[-1] for caption in captions if "background" in caption)
    assert len(grounds) == 7 and min(grounds.values()) > 200


def test_every_long_question_is_asked_about_scenes_and_other_pictures() -> None:
    rows = [question_about(seed, Thirty()) for seed in range(200)]
    assert {(row["caption"].startswith("kind"), row["question"]) for row in rows} == {
        (real, question) for real in (False, True) for question in LONG
    }
