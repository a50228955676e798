"""Roads not taken: where the target could have said something else, it does, and goes on from there.

All continuations of a sequence start from one pass over its text and share the text's key/value cache; a further pass
appends one token to each of them. What they are drafted from, features and tokens, stands beside the text's own
(`beside`), so that a drafter is trained along all of them at once.

Legend: B sequences, T tokens, P paths of a sequence, L tokens of a path, K steps, h hidden.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vsd.errors import VSDError
from vsd.paths.recorded import Paths
from vsd.targets import Target
from vsd.targets.sampling import drawn_at


class Entries(NamedTuple):
    """What can be drafted from, E places in each of B sequences: features, and the token that follows.

    Attributes:
        aux: target features, [B, E, 3h].
        next_ids: the token behind, [B, E].
        positions: [B, E]; None: one text, 0 … E - 1.
        seen: which entries each sees, itself included, [B, E, E] bool; None: one text, those up to it.
    """

    aux: Tensor
    next_ids: Tensor
    positions: Tensor | None = None
    seen: Tensor | None = None


class Continuations(NamedTuple):
    """What the target said instead.

    Attributes:
        roots: the entry each path hangs from, [B, P]; its first token stands at root + 2.
        tokens: [B, P, L].
        hidden: its final hidden states where it predicts them, [B, P, L, h].
        log_normaliser: logsumexp of its logits there, at the temperature it is served at, [B, P, L].
        aux: what it would give a drafter at the first L - 1 tokens, [B, P, L - 1, 3h].
    """

    roots: Tensor
    tokens: Tensor
    hidden: Tensor
    log_normaliser: Tensor
    aux: Tensor


def check_length(target: Target, tokens: int, length: int) -> None:
    """Refuse continuations, and texts of so many tokens, that are too long for the target: see `continue_text`."""
    limit = getattr(target.config, "max_position_embeddings", None)
    if limit is not None and tokens + length > limit:
        raise VSDError(f"texts of {tokens} tokens and continuations of {length}: the target has {limit} positions")
    if target.window is not None and length > target.window:  # nodes stand in slots behind their positions
        raise VSDError(f"continuations of {length} tokens, but the target's attention sees only {target.window}")


@torch.no_grad()
def continue_text(
    target: Target,
    ids: Tensor,
    roots: Tensor,
    length: int,
    temperature: float,
    uniform: Tensor,
) -> Continuations:
    """Below every root another token than the text's, by its chance in p, and `length` - 1 more behind it.

    Args:
        ids: right-padded text, [B, T].
        roots: entries to go on from, [B, P]; every one has a token at root + 2.
        length: L > 1.
        temperature: > 0, of p.
        uniform: numbers in [0, 1) that decide what is drawn, [B, P, L].

    Raises:
        VSDError: paths that leave the target's context, or are longer than a window its attention slides over the text.
    """
    (B, T), P = ids.shape, roots.shape[1]
    check_length(target, T, length)
    cache = target.new_cache(B, T + P * (length - 1))
    whole = torch.full((B,), T, device=ids.device)
    text = target.prefill(ids, whole, cache)  # with its padding, which nobody sees
    seen = torch.arange(T, device=ids.device) < (roots + 2)[..., None]  # [B, P, T], then T + P, …
    own = torch.eye(P, dtype=torch.bool, device=ids.device)[None]
    last = text.hidden.gather(1, (roots + 1)[..., None].expand(-1, -1, text.hidden.shape[-1]))
    tokens: list[Tensor] = []
    hidden, normalisers, aux = [last], [], []
    for step in range(length):
        if step:
            output = target.forward(tokens[-1], roots + 1 + step, own, cache, seen)
            cache.commit(torch.arange(P, device=ids.device).expand(B, P), torch.full_like(whole, P))
            seen = torch.cat([seen, own.expand(B, P, P)], dim=-1)
            hidden.append(output.hidden)
            aux.append(output.aux)
        logits = target.logits(hidden[-1]) / temperature  # [B, P, V]
        normalisers.append(logits.logsumexp(-1))
        if not step:
            logits = logits.scatter(-1, ids.gather(1, roots + 2)[..., None], float("-inf"))
        tokens.append(drawn_at(logits.softmax(-1), uniform[..., step]))
    return Continuations(roots, *(torch.stack(x, 2) for x in (tokens, hidden, normalisers, aux)))


def beside(text: Entries, found: Continuations) -> Entries:
    """The entries of a text and, behind them, those of its continuations' first L - 1 tokens, path by path.

    A token's entry holds the features at the token before. It stands where the text's own next token would.
    """
    B, T = text.next_ids.shape
    P, L = found.tokens.shape[1:]
    last = text.aux.gather(1, (found.roots + 1)[..., None].expand(-1, -1, text.aux.shape[-1]))
    before = torch.cat([last[:, :, None], found.aux], dim=2)[:, :, : L - 1]  # [B, P, L - 1, 3h]
    places = torch.arange(T, device=text.aux.device)
    order = torch.arange(L - 1, device=text.aux.device)
    own = torch.block_diag(*[order[:, None] >= order] * P).bool()  # [P (L - 1), P (L - 1)]
    above = (places <= found.roots[..., None]).repeat_interleave(L - 1, dim=1)  # [B, P (L - 1), T]
    causal = F.pad(places[:, None] >= places, (0, len(own))).expand(B, -1, -1)
    positions = (found.roots[..., None] + 1 + order).flatten(1)
    return Entries(
        torch.cat([text.aux, before.flatten(1, 2)], dim=1),
        torch.cat([text.next_ids, found.tokens[..., :-1].flatten(1)], dim=1),
        torch.cat([places.expand(B, T), positions], dim=1),
        torch.cat([causal, torch.cat([above, own.expand(B, -1, -1)], dim=2)], dim=1),
    )


def along(found: Continuations, exists: Tensor, entries: int, steps: int) -> Paths:
    """The K tokens below every root and below every token of continuations, as far as they go: [B, L P, K].

    Args:
        exists: which tokens are there, [B, P, L] bool, none behind one that is not.
        entries: how many of the text stand before those of the continuations.
    """
    (B, P, L), device = found.tokens.shape, found.tokens.device
    below = entries + torch.arange(P * (L - 1), device=device).view(P, L - 1)
    roots = torch.cat([found.roots[..., None], below.expand(B, -1, -1)], dim=-1)  # [B, P, L]
    rows = torch.arange(B * P * L, device=device).view(B, P, L)
    ahead = (F.pad(x, (0, steps - 1)).unfold(-1, steps, 1) for x in (found.tokens, exists, rows))  # [B, P, L, K]
    return Paths(roots.flatten(1), *(x.flatten(1, 2) for x in ahead))
