"""τ without verification: the target's answers are known, so drafting is replayed along them.

A greedy answer is what speculative decoding would decode, token for token. Which drafted tokens it accepts can
therefore be read off the answer, and the features it would draft from come from one pass over the whole text. What is
left is the drafter's work: an order of magnitude less than decoding, for exactly decoding's τ.

Above temperature 0 the same holds for answers the target has drawn: by rule `target` what it draws does not depend on
what is drafted. By `rejection` kept and drawn tokens are coupled, so that a token x of the answer was a kept draft with
probability min(1, q(x) / p(x)), given that those before were: one coin a token replays decoding in law. All drafters,
all trees and both rules are thus compared on the same answers.

Legend: B active rows, T tokens of the longest text, N nodes of a tree, A accepted nodes of the luckiest row, h hidden,
V target vocabulary.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vsd.data.generate import pad
from vsd.decoding.engine import Result
from vsd.decoding.lookup import SURE, Lookup
from vsd.drafters import DraftCache, Eagle3Drafter, of_label
from vsd.errors import VSDError
from vsd.paths import NO_TOKEN, Tree, TreeShape, draw_tree, graft
from vsd.targets import Target
from vsd.verification import follow
from vsd.verification.rejection import acceptance

_NOTHING = -2  # a token no drafter proposes
_BATCH = 32
_HEAD_ROWS = 512  # logits of so many tokens at once

Sizes = list[tuple[int, int]]  # of every row's tree: nodes, levels drafted

Text = tuple[list[int], list[int]]  # token ids of a prompt and of the target's answer


class _Batch(NamedTuple):
    """Texts by number, read: ids [B, T], lengths [B], where the first roots stand [B], features [B, T, 3h].

    log_p [B, T]: the target's log-probability of the answers' tokens; None where nobody asks.
    """

    texts: list[int]
    ids: Tensor
    lengths: Tensor
    start: Tensor
    aux: Tensor
    log_p: Tensor | None = None


class _Walk(NamedTuple):
    """What drafts along a batch, how far, and what it has read: its cache, and lookups by number of the text.

    coins: tossed for rejection; None verifies trees. draft_of [V]: the drafter's row of every token, -1 for none.
    """

    drafter: Eagle3Drafter
    shape: TreeShape
    cache: DraftCache
    lookups: dict[int, Lookup]
    coins: torch.Generator | None
    draft_of: Tensor


class Replay:
    """Answers the target has given, read once, to replay any number of drafters and trees along.

    Args:
        texts: (prompt, answer) token ids. Answers must be the target's own; they may end anywhere.
        temperature: at which it gave them.
    """

    @torch.inference_mode()
    def __init__(self, target: Target, texts: Sequence[Text], temperature: float = 0.0) -> None:
        self.target, self.texts, self.temperature = target, list(texts), temperature
        drafted = [i for i, (_, answer) in enumerate(self.texts) if len(answer) > 1]
        drafted.sort(key=lambda i: sum(map(len, self.texts[i])))
        self.batches = [self._read(drafted[i : i + _BATCH]) for i in range(0, len(drafted), _BATCH)]

    @torch.inference_mode()
    def __call__(
        self, drafter: Eagle3Drafter, shape: TreeShape, verification: str = "auto", seed: int = 0
    ) -> list[Result]:
        """What `Engine(target, drafter, shape, verification)` would accept and deliver, in the order of the texts.

        Args:
            seed: of the coins that "rejection" tosses.

        Raises:
            VSDError: rejection at temperature 0, or for anything but a chain without p_min and lookup.
        """
        if verification == "rejection" and (not self.temperature or shape != TreeShape.chain(shape.depth)):
            raise VSDError("rejection is replayed for plain chains above temperature 0")
        results = [Result(prompt, list(answer), "replay") for prompt, answer in self.texts]
        coins = torch.Generator(self.target.device).manual_seed(seed) if verification == "rejection" else None
        for batch in self.batches if coins is None else self._judged:
            self._replay(batch, drafter, shape, results, coins)
        return results

    @cached_property
    def _judged(self) -> list[_Batch]:
        """The batches with the target's log-probability of every token of the answers: rejection needs them."""
        return [batch._replace(log_p=self._log_p(batch)) for batch in self.batches]

    def _read(self, index: list[int]) -> _Batch:
        device = self.target.device
        ids, lengths = pad([self.texts[i][0] + self.texts[i][1] for i in index], device)
        start = torch.tensor([len(self.texts[i][0]) for i in index], device=device)
        return _Batch(index, ids, lengths, start, self.target.features(ids).aux)

    def _log_p(self, batch: _Batch) -> Tensor:
        """[B, T]; 0 where no draft can be accepted."""
        ids, places = batch.ids, torch.arange(batch.ids.shape[1], device=batch.ids.device)
        row, place = ((places > batch.start[:, None]) & (places < batch.lengths[:, None])).nonzero(as_tuple=True)
        hidden, tokens = self.target.features(ids).hidden[row, place - 1], ids[row, place]
        found = [
            (self.target.logits(some) / self.temperature).log_softmax(-1).gather(1, words[:, None])[:, 0]
            for some, words in zip(hidden.split(_HEAD_ROWS), tokens.split(_HEAD_ROWS))
        ]
        log_p = torch.zeros(ids.shape, device=ids.device)
        log_p[row, place] = torch.cat(found)
        return log_p

    def _replay(
        self,
        batch: _Batch,
        drafter: Eagle3Drafter,
        shape: TreeShape,
        results: list[Result],
        coins: torch.Generator | None,
    ) -> None:
        """Draft, look up what is accepted, go on behind it; rows leave when their answer ends."""
        cache = drafter.new_cache(len(batch.texts), batch.ids.shape[1] + shape.depth * shape.top_k)
        walk = _Walk(drafter, shape, cache, {i: Lookup() for i in batch.texts}, coins, drafter.draft_of())
        draft = self._propose if coins is None else self._couple
        hidden = self._extend(walk, batch, torch.zeros_like(batch.start), batch.start)
        while True:
            counts, sizes = draft(walk, batch, hidden)
            left = batch.lengths - 1 - batch.start
            for i, count, most, size in zip(batch.texts, counts.tolist(), left.tolist(), sizes):
                results[i].accepted.append(count - 1)
                results[i].delivered.append(min(count, most))
                results[i].trees.append(size)
            keep = (counts < left).nonzero()[:, 0]
            if not len(keep):
                return
            if len(keep) < len(counts):
                texts, counts = [batch.texts[b] for b in keep.tolist()], counts[keep]
                batch = _Batch(texts, *(x if x is None else x[keep] for x in batch[1:]))  # type: ignore[arg-type]
                cache.select(keep)
            hidden = self._extend(walk, batch, batch.start, counts)
            batch = batch._replace(start=batch.start + counts)

    def _propose(self, walk: _Walk, batch: _Batch, hidden: Tensor) -> tuple[Tensor, Sizes]:
        """New tokens of a pass over a tree below every root, [B], and the trees' sizes."""
        ids, at = batch.ids, batch.start
        root = ids.gather(1, at[:, None])[:, 0]
        tree = draw_tree(walk.drafter, self.target.embed, hidden, root, walk.cache, walk.shape)
        places = [(walk.lookups[i], i, end) for i, end in zip(batch.texts, at.tolist())]
        tree, sizes = self._as_alone(tree, walk.shape, places)
        behind = at[:, None] + tree.depths + 1  # [B, N] where the token that follows each node stands
        choice = ids.gather(1, behind.clamp(max=ids.shape[1] - 1))
        return follow(tree, choice.masked_fill(behind >= batch.lengths[:, None], _NOTHING)).counts, sizes

    def _couple(self, walk: _Walk, batch: _Batch, hidden: Tensor) -> tuple[Tensor, Sizes]:
        """New tokens of a pass over a chain drawn below every root, [B], if it is verified by rejection."""
        assert batch.log_p is not None
        ids, drafter, depth = batch.ids, walk.drafter, walk.shape.depth
        kept = torch.ones_like(batch.start, dtype=torch.bool)
        counts = torch.ones_like(batch.start)
        for k in range(depth):
            place = batch.start + 1 + k
            index = place.clamp(max=ids.shape[1] - 1)[:, None]
            token, log_p = ids.gather(1, index), batch.log_p.gather(1, index)[:, 0]
            law = (drafter.log_probs(hidden[:, 0]) / self.temperature).log_softmax(-1)
            log_q = of_label(law, walk.draft_of[token[:, 0]], float("-inf"))
            coin = torch.rand(len(counts), device=ids.device, generator=walk.coins)
            kept = kept & (coin < acceptance(log_q, log_p)) & (place < batch.lengths)
            counts = counts + kept.long()
            if k + 1 < depth:
                scratch = torch.ones(len(counts), 1, k + 1, dtype=torch.bool, device=ids.device)
                hidden = drafter.expand(hidden, self.target.embed(token), k + 1, scratch, walk.cache)
        return counts, [(walk.shape.nodes, depth)] * len(counts)

    def _as_alone(self, tree: Tree, shape: TreeShape, places: list[tuple[Lookup, int, int]]) -> tuple[Tree, Sizes]:
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

    def _extend(self, walk: _Walk, batch: _Batch, start: Tensor, counts: Tensor) -> Tensor:
        """Commit entries start … start + counts - 1 of every row to the drafter's cache -> hidden [B, 1, h]."""
        ids, aux = batch.ids, batch.aux
        last = ids.shape[1] - 1
        places = start[:, None] + torch.arange(int(counts.max()), device=ids.device)
        features = aux.gather(1, places.clamp(max=last)[..., None].expand(-1, -1, aux.shape[-1]))
        following = ids.gather(1, (places + 1).clamp(max=last))
        return walk.drafter.extend(features, self.target.embed(following), counts, walk.cache)
