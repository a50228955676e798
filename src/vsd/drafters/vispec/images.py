"""The images of a text among its entries: which entries hold one, and which image is the last before each.

An image is a run of placeholder tokens; entries hold the token *behind* their position (`vsd.paths.entries`).

Legend: B batch, E entries, R images of the text that has most.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Images(NamedTuple):
    """Images of B texts.

    Attributes:
        here: which entries hold a token of an image, [B, E] bool.
        begun: images that an entry sees begin, [B, E]; n: image n - 1 is the last one.
        inside: the entries of every image, [B, R, E] bool; R is at least 1, texts with fewer images have empty ones.
        left: entries from one that holds an image to the last of that image, [B, E].
    """

    here: Tensor
    begun: Tensor
    inside: Tensor
    left: Tensor

    @classmethod
    def of(cls, here: Tensor, seen: Tensor | None = None) -> "Images":
        """The images that entries `here` [B, E] (bool) hold.

        Args:
            seen: as in `Entries`. Entries that do not see all those before them are of continuations, and hold none.
        """
        order = torch.arange(here.shape[1], device=here.device)
        if seen is not None:
            here = here & (seen.sum(-1) == order + 1)
        starts = here & ~F.pad(here[:, :-1], (1, 0))
        begun = starts.cumsum(1) if seen is None else (seen & starts[:, None]).sum(-1)
        number = torch.arange(max(1, int(begun.max())), device=here.device)
        inside = here[:, None] & (begun[:, None] == number[:, None] + 1)
        last = (inside * order).amax(-1)  # [B, R]
        return cls(here, begun, inside, last.gather(1, (begun - 1).clamp(min=0)) - order)
