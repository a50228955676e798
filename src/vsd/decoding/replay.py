"""τ at temperature 0 without verification: the target's answers are known, so drafting is replayed along them.

A greedy answer is what speculative decoding would decode, token for token. Which drafted tokens it accepts can
therefore be read off the answer, and the features it would draft from come from one pass over the whole text. What is
left is the drafter's work: an order of magnitude less than decoding, for exactly decoding's τ.

Legend: B active rows, T tokens of the longest text, N nodes of a tree, A accepted nodes of the luckiest row, h hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vsd.data.generate import pad
from vsd.decoding.engine import Result
from vsd.drafters import DraftCache, Eagle3Drafter
from vsd.paths import TreeShape, draw_tree
from vsd.targets import Target
from vsd.verification import follow

_NOTHING = -1  # a token no drafter proposes


@torch.inference_mode()
def replay(
    target: Target, drafter: Eagle3Drafter, shape: TreeShape, texts: Sequence[tuple[list[int], list[int]]]
) -> list[Result]:
    """What `Engine(target, drafter, shape)` would accept and deliver, given (prompt, greedy answer) token ids.

    Answers must be the target's own at temperature 0; they may end anywhere.
    """
    results = [Result(prompt, list(answer), "replay") for prompt, answer in texts]
    rows = [i for i, result in enumerate(results) if len(result.tokens) > 1]
    if not rows:
        return results
    ids, lengths = pad([results[i].prompt + results[i].tokens for i in rows], target.device)
    aux = target.features(ids).aux
    ids = torch.where(torch.arange(ids.shape[1], device=ids.device) < lengths[:, None], ids, _NOTHING)
    at = torch.tensor([len(results[i].prompt) for i in rows], device=ids.device)  # where the root stands, [B]
    cache = drafter.new_cache(len(rows), ids.shape[1] + shape.depth * shape.top_k)
    hidden = _extend(target, drafter, ids, aux, torch.zeros_like(at), at, cache)
    while True:
        root = ids.gather(1, at[:, None])[:, 0]
        tree = draw_tree(drafter, target.embed, hidden, root, cache, shape)
        ahead = at[:, None] + tree.depths + 1  # [B, N] where the token behind every node stands
        choice = ids.gather(1, ahead.clamp(max=ids.shape[1] - 1)).masked_fill(ahead >= lengths[:, None], _NOTHING)
        counts = follow(tree, choice).counts
        left = lengths - 1 - at
        for i, count, most in zip(rows, counts.tolist(), left.tolist()):
            results[i].accepted.append(count - 1)
            results[i].delivered.append(min(count, most))
        keep = (counts < left).nonzero()[:, 0]
        if 0 < len(keep) < len(rows):
            rows = [rows[b] for b in keep.tolist()]
            ids, aux, lengths, at, counts = (field[keep] for field in (ids, aux, lengths, at, counts))
            cache.select(keep)
        if not len(keep):
            break
        hidden = _extend(target, drafter, ids, aux, at, counts, cache)
        at = at + counts
    return results


def _extend(
    target: Target, drafter: Eagle3Drafter, ids: Tensor, aux: Tensor, start: Tensor, counts: Tensor, cache: DraftCache
) -> Tensor:
    """Commit entries start … start + counts - 1 of every row to the drafter's cache -> hidden [B, 1, h]."""
    places = start[:, None] + torch.arange(int(counts.max()), device=ids.device)
    entries = places.clamp(max=ids.shape[1] - 1)
    following = ids.gather(1, (places + 1).clamp(max=ids.shape[1] - 1)).clamp(min=0)
    features = aux.gather(1, entries[..., None].expand(-1, -1, aux.shape[-1]))
    return drafter.extend(features, target.embed(following), counts, cache)
