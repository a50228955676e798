"""What the vision tower learns from scenes: facts are those of the patches, and a tiny tower learns them by heart."""

import re

import torch
from PIL import Image
from transformers import LlamaConfig, LlavaConfig, SiglipVisionConfig

from eye import EXTENTS, HUES, WHATS, Eye, Words, batch_of, facts_of
from real_pictures import Picture
from vsd.pictures import caption, scene
from vsd.targets.vision import IMAGE_TOKENS, PATCH, SIDE


class Splitter:
    """A tokenizer of words and punctuation."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self.ids.setdefault(word, len(self.ids)) for word in re.findall(r"\n|\w+|[:,.]", text)]


def test_patches_name_the_thing_on_them() -> None:
    for seed in range(30):
        one = scene(seed)
        facts = facts_of(one).view(SIDE // PATCH, SIDE // PATCH, 3)
        for thing in one.things:
            what, hue, extent = facts[int(thing.y) // PATCH, int(thing.x) // PATCH].tolist()
            found = WHATS[what - 1], HUES[hue - 1], EXTENTS[extent - 1]
            assert found == (thing.what, thing.colour, thing.size)
        assert len(facts.flatten(0, 1).unique(dim=0)) <= 1 + len(one.things)


def test_captions_are_one_class_a_position() -> None:
    tokenizer = Splitter()
    words = Words(tokenizer, samples=50)
    back = {number: word for word, number in tokenizer.ids.items()}
    classes = words.of(caption(scene(3)))
    assert len(classes) == IMAGE_TOKENS
    said = " ".join(back[words.ids[index]] for index in classes)
    assert re.sub(r"\s+([:,.])", r"\1", said).split() == caption(scene(3)).split()


def tiny_eye(words: Words) -> Eye:
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**tower, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=LlamaConfig(hidden_size=64),
    )
    return Eye(config, 0.3 * torch.randn(len(words.ids), 64))


def test_pictures_of_other_programs_teach_their_captions_and_no_facts() -> None:
    words = Words(Splitter(), samples=50, more=["an emoji: red apple."])
    apple = Picture(Image.new("RGB", (SIDE, SIDE), "red"), "an emoji: red apple.", [])
    batch = batch_of([0, 1], words, [apple])
    assert batch.words[2].tolist() == words.of("an emoji: red apple.")
    eye = tiny_eye(words)
    losses, without = eye.losses(batch), eye.losses(batch_of([0, 1], words))
    torch.testing.assert_close(losses.facts, without.facts)
    assert losses.words != without.words


def test_a_tiny_tower_learns_two_scenes_by_heart() -> None:
    words = Words(Splitter(), samples=50)
    eye = tiny_eye(words)
    optimizer = torch.optim.AdamW(eye.parameters(), lr=5e-3)
    batch = batch_of([0, 1], words)
    for _ in range(150):
        losses = eye.losses(batch)
        (losses.facts + losses.words + losses.far).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses.right > 0.95 and losses.facts < 0.5
