"""Alternative continuations of a text, sampled from the target.

All continuations of a sequence start from one pass over its text and share the text's key/value cache; a further pass
appends one token to each of them. Their entries are appended to the text's own (`extended`), so that a drafter is
trained along all of them in one pass.

Legend: B sequences, T tokens, P paths of a sequence, L tokens of a path, K steps, h hidden, n h width of the features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vsd.errors import DataError
from vsd.paths.entries import Entries, rows_at
from vsd.paths.recorded import Paths
from vsd.targets import Padded, Prefill, Target, TargetInfo
from vsd.targets.sampling import drawn_at


class Continuations(NamedTuple):
    """P alternative continuations of each text.

    Attributes:
        roots: the entry each path hangs from, [B, P]; its first token stands at root + 2.
        tokens: [B, P, L].
        hidden: the target's final hidden states that predict the tokens, [B, P, L, h].
        log_normaliser: logsumexp of the logits of each, at the served temperature, [B, P, L].
        aux: target features of the first L - 1 tokens, [B, P, L - 1, n h].
    """

    roots: Tensor
    tokens: Tensor
    hidden: Tensor
    log_normaliser: Tensor
    aux: Tensor


def check_length(target: TargetInfo, tokens: int, length: int) -> None:
    """Refuse continuations of texts of so many tokens that would leave the target's context.

    Raises:
        DataError: they would.
    """
    if target.context is not None and tokens + length > target.context:
        raise DataError(
            f"texts of {tokens} tokens and continuations of {length}: the target has {target.context} positions"
        )


@torch.no_grad()
def continue_text(
    target: Target,
    text: Padded,
    roots: Tensor,
    length: int,
    temperature: float,
    uniform: Tensor,
    layers: tuple[int, ...],
    prefill: Prefill | None = None,
) -> Continuations:
    """Below every root a token other than the text's, drawn from p without it, and `length` - 1 more drawn from p.

    Args:
        roots: entries to branch off at, [B, P]; every one has a token at root + 2.
        length: L > 1.
        temperature: > 0, of p.
        uniform: numbers in [0, 1) that decide the draws, [B, P, L].
        layers: features to return.
        prefill: of the text, if it was read before; its cache need not grow where it has room for P (L - 1) tokens.

    Raises:
        DataError: paths that leave the target's context.
    """
    ids = text.ids
    (B, T), P = ids.shape, roots.shape[1]
    check_length(target, T, length)
    read, cache = prefill or target.read(text, P * (length - 1))[0]
    behind = text.first_row.gather(1, roots + 1)  # [B, P]
    seen = torch.arange(T, device=ids.device) < (roots + 2)[..., None]  # [B, P, T], then T + P, …
    own = torch.eye(P, dtype=torch.bool, device=ids.device)[None]
    last = rows_at(read, roots + 1)
    tokens: list[Tensor] = []
    hidden, normalisers, aux = [last], [], []
    for step in range(length):
        if step:
            output = target.forward(tokens[-1], behind + step, own, cache, seen, layers)
            cache.commit(torch.arange(P, device=ids.device).expand(B, P), ids.new_full((B,), P))
            seen = torch.cat([seen, own.expand(B, P, P)], dim=-1)
            hidden.append(output.hidden)
            aux.append(output.aux)
        logits = target.logits(hidden[-1]) / temperature  # [B, P, V]
        normalisers.append(logits.logsumexp(-1))
        numbers = uniform[..., step]
        tokens.append(drawn_at(logits.softmax(-1), numbers) if step else other_token(logits, ids, roots + 2, numbers))
    if prefill is not None:
        cache.truncate(ids.new_full((B,), T))  # as it was: the batch may have other paths
    return Continuations(roots, *(torch.stack(x, 2) for x in (tokens, hidden, normalisers, aux)))


def other_token(logits: Tensor, ids: Tensor, places: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [B, P] drawn from logits [B, P, V] at `places` [B, P] of texts ids [B, T], without the texts' own there.

    Args:
        uniform: numbers in [0, 1) that decide the draws, [B, P].
    """
    others = logits.scatter(-1, ids.gather(1, places)[..., None], float("-inf"))
    return drawn_at(others.softmax(-1), uniform)


def extended(text: Entries, found: Continuations) -> Entries:
    """The entries of a text and, behind them, those of its continuations' first L - 1 tokens, path by path.

    A token's entry holds the features at the token before; its position is that of the text's own entry there.
    """
    B, T = text.next_ids.shape
    P, L = found.tokens.shape[1:]
    last = rows_at(text.aux, found.roots + 1)
    before = torch.cat([last[:, :, None], found.aux], dim=2)[:, :, : L - 1]  # [B, P, L - 1, n h]
    places = torch.arange(T, device=text.aux.device)
    order = torch.arange(L - 1, device=text.aux.device)
    own = torch.block_diag(*[order[:, None] >= order] * P).bool()  # [P (L - 1), P (L - 1)]
    above = (places <= found.roots[..., None]).repeat_interleave(L - 1, dim=1)  # [B, P (L - 1), T]
    causal = F.pad(places[:, None] >= places, (0, len(own))).expand(B, -1, -1)
    positions = (text.positions.gather(1, found.roots)[..., None] + 1 + order).flatten(1)
    return Entries(
        torch.cat([text.aux, before.flatten(1, 2)], dim=1),
        torch.cat([text.next_ids, found.tokens[..., :-1].flatten(1)], dim=1),
        text.first_ids,
        torch.cat([text.positions, positions], dim=1),
        torch.cat([causal, torch.cat([above, own.expand(B, -1, -1)], dim=2)], dim=1),
    )


def along(found: Continuations, exists: Tensor, count: int, steps: int) -> Paths:
    """The K tokens below every root and below every token of continuations, as far as they go: [B, L P, K].

    Args:
        exists: which tokens are there, [B, P, L] bool, none behind one that is not.
        count: entries of the text, which precede those of the continuations.
    """
    (B, P, L), device = found.tokens.shape, found.tokens.device
    below = (count + torch.arange(P * (L - 1), device=device).view(P, L - 1)).expand(B, -1, -1)
    roots = torch.cat([found.roots[..., None], below], dim=-1)  # [B, P, L]
    rows = torch.arange(B * P * L, device=device).view(B, P, L)
    entries = F.pad(below, (0, 1), value=-1)  # no entry holds a last token
    fields = (found.tokens, exists, rows, entries)
    ahead = (F.pad(x, (0, steps - 1)).unfold(-1, steps, 1) for x in fields)  # [B, P, L, K]
    return Paths(roots.flatten(1), *(x.flatten(1, 2) for x in ahead))
