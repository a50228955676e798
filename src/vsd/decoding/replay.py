"""τ at temperature 0 without verification: the target's answers are known, so drafting is replayed along them.

A greedy answer is what speculative decoding would decode, token for token. Which drafted tokens it accepts can
therefore be read off the answer, and the features it would draft from come from one pass over the whole text. What is
left is the drafter's work: an order of magnitude less than decoding, for exactly decoding's τ.

Legend: B active rows, T tokens of the longest text, N nodes of a tree, A accepted nodes of the luckiest row, h hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vsd.data.generate import pad
from vsd.decoding.engine import Result
from vsd.decoding.lookup import SURE, Lookup
from vsd.drafters import DraftCache, Eagle3Drafter
from vsd.paths import NO_TOKEN, Tree, TreeShape, draw_tree, graft
from vsd.targets import Target
from vsd.verification import follow

_NOTHING = -2  # a token no drafter proposes
_BATCH = 32

Text = tuple[list[int], list[int]]  # token ids of a prompt and of the target's greedy answer


class _Batch(NamedTuple):
    """Texts by number, read: ids [B, T], lengths [B], where the first roots stand [B], features [B, T, 3h]."""

    texts: list[int]
    ids: Tensor
    lengths: Tensor
    start: Tensor
    aux: Tensor


class Replay:
    """Answers the target has given, read once, to replay any number of drafters and trees along.

    Args:
        texts: (prompt, answer) token ids. Answers must be the target's own at temperature 0; they may end anywhere.
    """

    @torch.inference_mode()
    def __init__(self, target: Target, texts: Sequence[Text]) -> None:
        self.target, self.texts = target, list(texts)
        drafted = [i for i, (_, answer) in enumerate(self.texts) if len(answer) > 1]
        drafted.sort(key=lambda i: sum(map(len, self.texts[i])))
        self.batches = [self._read(drafted[i : i + _BATCH]) for i in range(0, len(drafted), _BATCH)]

    @torch.inference_mode()
    def __call__(self, drafter: Eagle3Drafter, shape: TreeShape) -> list[Result]:
        """What `Engine(target, drafter, shape)` would accept and deliver, in the order of the texts."""
        results = [Result(prompt, list(answer), "replay") for prompt, answer in self.texts]
        for batch in self.batches:
            self._walk(batch, drafter, shape, results)
        return results

    def _read(self, index: list[int]) -> _Batch:
        device = self.target.device
        ids, lengths = pad([self.texts[i][0] + self.texts[i][1] for i in index], device)
        start = torch.tensor([len(self.texts[i][0]) for i in index], device=device)
        return _Batch(index, ids, lengths, start, self.target.features(ids).aux)

    def _walk(self, batch: _Batch, drafter: Eagle3Drafter, shape: TreeShape, results: list[Result]) -> None:
        """Draft, look up what is accepted, go on behind it; rows leave when their answer ends."""
        rows, ids, lengths, at, aux = batch
        lookups = {i: Lookup() for i in rows}
        cache = drafter.new_cache(len(rows), ids.shape[1] + shape.depth * shape.top_k)
        hidden = self._extend(drafter, ids, aux, torch.zeros_like(at), at, cache)
        while True:
            root = ids.gather(1, at[:, None])[:, 0]
            tree = draw_tree(drafter, self.target.embed, hidden, root, cache, shape)
            tree, sizes = self._as_alone(tree, shape, [(lookups[i], i, end) for i, end in zip(rows, at.tolist())])
            behind = at[:, None] + tree.depths + 1  # [B, N] where the token that follows each node stands
            choice = ids.gather(1, behind.clamp(max=ids.shape[1] - 1))
            counts = follow(tree, choice.masked_fill(behind >= lengths[:, None], _NOTHING)).counts
            left = lengths - 1 - at
            for i, count, most, size in zip(rows, counts.tolist(), left.tolist(), sizes):
                results[i].accepted.append(count - 1)
                results[i].delivered.append(min(count, most))
                results[i].trees.append(size)
            keep = (counts < left).nonzero()[:, 0]
            if not len(keep):
                return
            if len(keep) < len(rows):
                rows = [rows[b] for b in keep.tolist()]
                ids, aux, lengths, at, counts = (field[keep] for field in (ids, aux, lengths, at, counts))
                cache.select(keep)
            hidden = self._extend(drafter, ids, aux, at, counts, cache)
            at = at + counts

    def _as_alone(
        self, tree: Tree, shape: TreeShape, places: list[tuple[Lookup, int, int]]
    ) -> tuple[Tree, list[tuple[int, int]]]:
        """Each row's tree as decoding it alone would have made it, and its size; the rest of its nodes never match.

        A tree of a batch is as big as its biggest. places: of every row its lookup, its text, where its root stands.
        """
        own = tree.log_q >= shape.floor  # [B, N]
        levels = [shape.levels(reached) for reached in tree.depths.masked_fill(~own, 0).amax(1).tolist()]
        if shape.lookup:
            found = []
            for lookup, i, end in places:
                lookup.extend((self.texts[i][0] + self.texts[i][1])[len(lookup.tokens) : end + 1])
                found.append(lookup.propose(shape.lookup))
            tree, copied = graft(tree, [tokens for tokens, _ in found])
            sure = torch.tensor([n >= SURE for _, n in found], device=own.device)
            own = F.pad(own, (0, copied.shape[1] - own.shape[1])) & ~sure[:, None] | copied
            levels = [0 if n >= SURE else count for (_, n), count in zip(found, levels)]
        tree = tree._replace(tokens=tree.tokens.masked_fill(~own, NO_TOKEN))
        return tree, list(zip(own.sum(1).tolist(), levels))

    def _extend(
        self, drafter: Eagle3Drafter, ids: Tensor, aux: Tensor, start: Tensor, counts: Tensor, cache: DraftCache
    ) -> Tensor:
        """Commit entries start … start + counts - 1 of every row to the drafter's cache -> hidden [B, 1, h]."""
        last = ids.shape[1] - 1
        places = start[:, None] + torch.arange(int(counts.max()), device=ids.device)
        features = aux.gather(1, places.clamp(max=last)[..., None].expand(-1, -1, aux.shape[-1]))
        following = ids.gather(1, (places + 1).clamp(max=last))
        return drafter.extend(features, self.target.embed(following), counts, cache)
