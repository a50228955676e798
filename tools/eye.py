"""Vision tower, projector, and what they learn from scenes without the language model.

Legend: B pictures, P patches, w the tower's width, h the language model's hidden size, W words of captions.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaConfig, PreTrainedTokenizerBase, SiglipVisionConfig, SiglipVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from real_pictures import Picture
from vsd.pictures.scenes import COLOURS, MOST, NUMBERS, SHAPES, SIDE, SIZES, WORDS, Scene, caption, render, scene
from vsd.targets.vision import IMAGE_TOKENS, PATCH

WHATS, HUES, EXTENTS = SHAPES + NUMBERS + WORDS, tuple(COLOURS), tuple(SIZES)
FACTS = (1 + len(WHATS), 1 + len(HUES), 1 + len(EXTENTS))  # classes of each fact of a patch; 0: no thing
UNKNOWN = -100  # a fact that is not learned
_FACTS_AT = -3  # patches know their facts two layers before the last one; those two collect them in the caption's order
_SHARPNESS = 3.0  # a word's logit: minus this times its embedding's squared distance
_MARGIN = 3  # pixels around a thing that still count as the thing


class Batch(NamedTuple):
    """Pictures as they are learned from.

    Attributes:
        pixels: [B, 3, S, S].
        facts: of every patch, [B, P, 3]; UNKNOWN for pictures of other programs.
        words: captions as indices of embeddings, [B', P]: of the first B' scenes.
    """

    pixels: Tensor
    facts: Tensor
    words: Tensor


class Losses(NamedTuple):
    """Means over a batch; `right`: share of caption tokens that are the nearest embedding."""

    facts: Tensor
    words: Tensor
    far: Tensor
    right: Tensor


class Eye(nn.Module):
    """Tower, projector and the heads of the facts.

    Args:
        embeddings: of the words of captions, [W, h].
    """

    embeddings: Tensor

    def __init__(self, config: LlavaConfig, embeddings: Tensor) -> None:
        super().__init__()
        vision = cast(SiglipVisionConfig, config.vision_config)
        self.tower = SiglipVisionModel(vision)
        self.projector = LlavaMultiModalProjector(config)
        self.heads = nn.Linear(vision.hidden_size, sum(FACTS))
        self.register_buffer("embeddings", embeddings, persistent=False)
        nn.init.normal_(self.tower.embeddings.position_embedding.weight, std=0.2)
        with torch.no_grad():
            self.projector.linear_2.weight.mul_(0.1)
            self.projector.linear_2.bias.copy_(embeddings.mean(0))

    def features(self, pixels: Tensor) -> Tensor:
        """What the projector reads of pixels [B, 3, S, S], [B, P, w]: the last layer, before the tower's last norm."""
        return self._layers(pixels)[-1]

    def _layers(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The embedded patches and the outputs of all layers, [B, P, w] each."""
        seen: tuple[Tensor, ...] = self.tower(pixels, output_hidden_states=True).hidden_states
        return seen

    def losses(self, batch: Batch) -> Losses:
        """Cross-entropy of facts and words, and the squared distance to the words' embeddings."""
        seen = self._layers(batch.pixels)
        named = self.heads(seen[_FACTS_AT]).split(FACTS, dim=-1)
        facts = sum(
            F.cross_entropy(one.flatten(0, 1), batch.facts[..., k].flatten(), ignore_index=UNKNOWN)
            for k, one in enumerate(named)
        )
        said = self.projector(seen[-1][: len(batch.words)]).flatten(0, 1)  # [B' P, h]
        distance = torch.cdist(said, self.embeddings).square()  # [B P, W]
        words = batch.words.flatten()
        return Losses(
            torch.as_tensor(facts),
            F.cross_entropy(-_SHARPNESS * distance, words),
            distance.gather(1, words[:, None]).mean(),
            (distance.argmin(-1) == words).float().mean(),
        )


class Words:
    """The tokens of captions as classes; captions are filled up with line breaks to one token an image position.

    Args:
        samples: scenes that have all words of scenes' captions.
        more: captions of other pictures.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, samples: int = 2000, more: Iterable[str] = ()) -> None:
        self.tokenizer = tokenizer
        captions = (caption(scene(seed)) for seed in range(samples))
        found = {token for text in chain(captions, more) for token in self._tokens(text)}
        self.ids = sorted(found)  # [W]
        self._index = {token: index for index, token in enumerate(self.ids)}

    def of(self, text: str) -> list[int]:
        """The classes of a caption, [P]."""
        return [self._index[token] for token in self._tokens(text)]

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        blank: list[int] = self.tokenizer.encode("\n", add_special_tokens=False)
        return tokens + blank * (IMAGE_TOKENS - len(tokens))


def batch_of(seeds: Sequence[int], words: Words, real: Sequence[Picture] = ()) -> Batch:
    """The scenes of these seeds, pictures of other programs, and as many crowded scenes, whose facts alone are learned.

    Crowded scenes show more things a second.
    """
    plain, crowded = [scene(seed, most=1 + seed % MOST) for seed in seeds], [scene(seed, 5, 9) for seed in seeds]
    unknown = torch.full((len(real), IMAGE_TOKENS, len(FACTS)), UNKNOWN)
    facts = [torch.stack([facts_of(one) for one in scenes]) for scenes in (plain, crowded)]
    images = [*map(render, plain), *(one.image for one in real), *map(render, crowded)]
    captions = [*map(caption, plain), *(one.caption for one in real)]
    return Batch(
        pixels_of(images), torch.cat([facts[0], unknown, facts[1]]), torch.tensor([words.of(text) for text in captions])
    )


def pixels_of(images: Iterable[Image.Image]) -> Tensor:
    """As the target's image processor gives them, [B, 3, S, S], in -1 … 1."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def facts_of(scene: Scene) -> Tensor:
    """Kind, colour and size of the thing on every patch, [P, 3]; 0 where there is none."""
    x, y = _centres()
    facts = torch.zeros(IMAGE_TOKENS, len(FACTS), dtype=torch.long)
    for thing in scene.things:
        reach = thing.half + _MARGIN
        near = (x - thing.x).abs().maximum((y - thing.y).abs()) < reach
        known = WHATS.index(thing.what), HUES.index(thing.colour), EXTENTS.index(thing.size)
        facts[near] = 1 + torch.tensor(known)
    return facts


@lru_cache
def _centres() -> tuple[Tensor, Tensor]:
    """x and y of the patches' centres in reading order, [P] each."""
    middle = torch.arange(SIDE // PATCH) * PATCH + PATCH / 2
    return middle.repeat(len(middle)), middle.repeat_interleave(len(middle))
