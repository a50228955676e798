"""τ without verification: replay drafting on recorded answers of the target.

Speculative decoding reproduces the target's greedy answer. The accepted tokens of a draft are therefore the drafted
tokens that equal the answer, and one target pass over the whole text computes all features. Only the drafter's passes
remain. Replay needs an order of magnitude less work than decoding and yields the same τ.

Above temperature 0 replay uses sampled answers of the target. With rule `target` the samples do not depend on the
draft. With `rejection`, a token x of the answer was an accepted draft with probability min(1, q(x) / p(x)), given that
all earlier tokens of the draft were accepted; one random number per token replays decoding in distribution. All
drafters, all trees and both rules are thus compared on the same answers.

Legend: B active rows, T tokens of the longest text, N nodes of a tree, A accepted nodes of the row that accepts most,
h hidden, V target vocabulary.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vsd.decoding.engine import Result
from vsd.decoding.lookup import SURE, Lookup
from vsd.drafters import Drafter
from vsd.errors import ConfigurationError
from vsd.paths import NO_TOKEN, Entries, Tree, TreeShape, graft, rows_at
from vsd.targets import Inputs, Padded, Target
from vsd.verification import follow
from vsd.verification.rejection import acceptance

_NOTHING = -2  # a token no drafter proposes
_BATCH = 32
_HEAD_ROWS = 512  # tokens whose logits are computed at once

Sizes = list[tuple[int, int]]  # for every row: nodes of the tree, drafted levels

Text = tuple[Inputs, list[int]]  # a prompt, and the token ids of the target's answer


class _Batch(NamedTuple):
    """A batch of texts: their numbers, tokens, and positions of the current roots [B].

    log_p [B, T]: the target's log-probabilities of the answers' tokens; None without rejection.
    """

    texts: list[int]
    padded: Padded
    start: Tensor
    log_p: Tensor | None = None

    def only(self, rows: Tensor) -> "_Batch":
        """The batch rows `rows` [B']."""
        texts, log_p = [self.texts[b] for b in rows.tolist()], None if self.log_p is None else self.log_p[rows]
        return _Batch(texts, self.padded.only(rows), self.start[rows], log_p)


class _Walk(NamedTuple):
    """Replay of one drafter on a batch: the drafter's state, its entries, and lookups by text number.

    coins: random generator for rejection; None for the other rules.
    """

    drafter: Drafter
    shape: TreeShape
    state: Any
    entries: Entries
    lookups: dict[int, Lookup]
    coins: torch.Generator | None

    def only(self, rows: Tensor) -> "_Walk":
        """The batch rows `rows` [B']."""
        self.state.select(rows)
        return self._replace(entries=Entries(*(field[rows] for field in self.entries[:4])))


class Replay:
    """Recorded answers; one target pass over them serves any number of drafters and trees.

    Args:
        texts: prompts and token ids of answers. The target must have generated the answers; they may be truncated.
        temperature: sampling temperature of the answers.
    """

    @torch.inference_mode()
    def __init__(self, target: Target, texts: Sequence[Text], temperature: float = 0.0) -> None:
        self.target, self.texts, self.temperature = target, list(texts), temperature
        self._kept: tuple[tuple[int, ...], dict[int, Tensor]] = (), {}
        drafted = [i for i, (_, answer) in enumerate(self.texts) if len(answer) > 1]
        drafted.sort(key=lambda i: len(self.texts[i][0].ids) + len(self.texts[i][1]))
        self.batches = [self._read(drafted[i : i + _BATCH]) for i in range(0, len(drafted), _BATCH)]

    @torch.inference_mode()
    def __call__(self, drafter: Drafter, shape: TreeShape, verification: str = "auto", seed: int = 0) -> list[Result]:
        """Results of `Engine(target, drafter, shape, verification)` on the texts, in their order.

        Args:
            seed: seed of the random numbers for "rejection".

        Raises:
            ConfigurationError: rejection at temperature 0, or with a shape other than a chain without p_min and lookup.
        """
        if verification == "rejection" and (not self.temperature or shape != TreeShape.chain(shape.depth)):
            raise ConfigurationError("rejection is replayed for plain chains above temperature 0")
        results = [Result(prompt, list(answer), "replay") for prompt, answer in self.texts]
        coins = torch.Generator(self.target.device).manual_seed(seed) if verification == "rejection" else None
        for batch in self.batches if coins is None else self._scored:
            self._replay(batch, drafter, shape, results, coins)
        return results

    @cached_property
    def _scored(self) -> list[_Batch]:
        """The batches with the target's log-probability of every answer token, for rejection."""
        return [batch._replace(log_p=self._log_p(batch)) for batch in self.batches]

    def _read(self, index: list[int]) -> _Batch:
        texts = [self.texts[i][0].followed_by(self.texts[i][1]) for i in index]
        padded = Padded.of(texts, self.target.device)
        start = torch.tensor([len(self.texts[i][0].ids) for i in index], device=self.target.device)
        return _Batch(index, padded, start)

    def _log_p(self, batch: _Batch) -> Tensor:
        """Log-probabilities of the answer tokens, [B, T]; 0 at positions that cannot be drafted."""
        ids, lengths = batch.padded.ids, batch.padded.lengths
        places = torch.arange(ids.shape[1], device=ids.device)
        row, place = ((places > batch.start[:, None]) & (places < lengths[:, None])).nonzero(as_tuple=True)
        hidden, tokens = self.target.features(batch.padded).hidden[row, place - 1], ids[row, place]
        found = [
            (self.target.logits(some) / self.temperature).log_softmax(-1).gather(1, labels[:, None])[:, 0]
            for some, labels in zip(hidden.split(_HEAD_ROWS), tokens.split(_HEAD_ROWS))
        ]
        log_p = torch.zeros(ids.shape, device=ids.device)
        log_p[row, place] = torch.cat(found)
        return log_p

    def _aux(self, batch: _Batch, layers: tuple[int, ...]) -> Tensor:
        """Features of `layers`, [B, T, n h]; the last features are cached for the next drafter with the same layers."""
        if layers != self._kept[0]:
            self._kept = layers, {}
        number = batch.texts[0]
        if number not in self._kept[1]:
            self._kept[1][number] = self.target.features(batch.padded, layers).aux
        return self._kept[1][number]

    def _begin(self, batch: _Batch, drafter: Drafter, shape: TreeShape, coins: torch.Generator | None) -> _Walk:
        """Create the drafter's state and read the prompts."""
        padded, aux = batch.padded, self._aux(batch, drafter.needs.layers)
        entries, longest = Entries.of(padded, aux), int(batch.start.max())
        prompt = Padded(padded.ids[:, :longest], batch.start, padded.positions[..., :longest], ())
        root = padded.ids.gather(1, batch.start[:, None])[:, 0]
        room = padded.ids.shape[1] + 1 + shape.depth * max(shape.top_k, 1)
        state = drafter.begin(prompt, aux[:, :longest], root, room)
        return _Walk(drafter, shape, state, entries, {i: Lookup() for i in batch.texts}, coins)

    def _replay(
        self,
        batch: _Batch,
        drafter: Drafter,
        shape: TreeShape,
        results: list[Result],
        coins: torch.Generator | None,
    ) -> None:
        """Draft, compare with the answer, advance past the accepted tokens; remove rows whose answer has ended."""
        walk = self._begin(batch, drafter, shape, coins)
        draft = self._propose if coins is None else self._couple
        while True:
            counts, sizes = draft(walk, batch)
            left = batch.padded.lengths - 1 - batch.start
            for i, count, most, size in zip(batch.texts, counts.tolist(), left.tolist(), sizes):
                results[i].accepted.append(count - 1)
                results[i].delivered.append(min(count, most))
                results[i].trees.append(size)
            keep = (counts < left).nonzero()[:, 0]
            if not len(keep):
                return
            if len(keep) < len(counts):
                batch, walk, counts = batch.only(keep), walk.only(keep), counts[keep]
            self._advance(walk, batch.start, counts)
            batch = batch._replace(start=batch.start + counts)

    def _propose(self, walk: _Walk, batch: _Batch) -> tuple[Tensor, Sizes]:
        """New tokens of a pass over a tree below every root, [B], and the trees' sizes."""
        ids, at = batch.padded.ids, batch.start
        root = ids.gather(1, at[:, None])[:, 0]
        tree = walk.drafter.propose(walk.state, root, walk.shape)
        places = [(walk.lookups[i], i, end) for i, end in zip(batch.texts, at.tolist())]
        tree, sizes = self._as_alone(tree, walk.shape, places)
        behind = at[:, None] + tree.depths + 1  # [B, N] position of the token that follows each node
        choice = ids.gather(1, behind.clamp(max=ids.shape[1] - 1))
        return follow(tree, choice.masked_fill(behind >= batch.padded.lengths[:, None], _NOTHING)).counts, sizes

    def _couple(self, walk: _Walk, batch: _Batch) -> tuple[Tensor, Sizes]:
        """New tokens of a pass over a chain sampled below every root, [B], verified by rejection."""
        assert batch.log_p is not None
        ids, depth = batch.padded.ids, walk.shape.depth
        places = batch.start[:, None] + 1 + torch.arange(depth, device=ids.device)  # [B, K]
        index = places.clamp(max=ids.shape[1] - 1)
        root = ids.gather(1, batch.start[:, None])[:, 0]
        log_q = walk.drafter.log_q(walk.state, root, ids.gather(1, index), self.temperature)
        coins = torch.rand(depth, len(ids), device=ids.device, generator=walk.coins).T
        kept = (coins < acceptance(log_q, batch.log_p.gather(1, index))) & (places < batch.padded.lengths[:, None])
        counts = 1 + kept.long().cumprod(-1).sum(-1)
        return counts, [(walk.shape.nodes, depth)] * len(counts)

    def _as_alone(self, tree: Tree, shape: TreeShape, places: list[tuple[Lookup, int, int]]) -> tuple[Tree, Sizes]:
        """Each row's tree, as decoded with batch size 1, and its size; other nodes get a token that never matches.

        All trees of a batch have as many nodes as the largest. places: for every row (lookup, text number, position of
        the root).
        """
        own = tree.log_q >= shape.floor  # [B, N]
        levels = [shape.levels(reached) for reached in tree.depths.masked_fill(~own, 0).amax(1).tolist()]
        if shape.lookup:
            found = []
            for lookup, i, end in places:
                lookup.extend((self.texts[i][0].ids + self.texts[i][1])[len(lookup.tokens) : end + 1])
                found.append(lookup.propose(shape.lookup))
            tree, copied = graft(tree, [tokens for tokens, _ in found])
            sure = torch.tensor([n >= SURE for _, n in found], device=own.device)
            own = F.pad(own, (0, copied.shape[1] - own.shape[1])) & ~sure[:, None] | copied
            levels = [0 if n >= SURE else count for (_, n), count in zip(found, levels)]
        tree = tree._replace(tokens=tree.tokens.masked_fill(~own, NO_TOKEN))
        return tree, list(zip(own.sum(1).tolist(), levels))

    def _advance(self, walk: _Walk, start: Tensor, counts: Tensor) -> None:
        """Advance the drafter by the entries start … start + counts - 1 of every row."""
        aux, next_ids = walk.entries.aux, walk.entries.next_ids
        places = start[:, None] + torch.arange(int(counts.max()), device=start.device)
        places = places.clamp(max=next_ids.shape[1] - 1)
        features = rows_at(aux, places)
        walk.drafter.advance(walk.state, features, next_ids.gather(1, places), counts)
