"""Rule `rejection`: speculative sampling of a drafted chain (Leviathan et al., 2211.17192; Chen et al., 2302.01318).

Token t is kept with probability min(1, p_t(z_t) / q_t(z_t)); at the first rejection the bonus token is drawn from
norm((p - q)_+), after a chain kept whole from p. The output's law is exactly p, whatever q is.

Legend: B batch, K drafted tokens, V target vocabulary, Vd draft vocabulary.
"""

import torch
from torch import Tensor

from vsd.paths import Chain
from vsd.verification.walk import Verdict


def acceptance(target_logp: Tensor, draft_logp: Tensor) -> Tensor:
    """min(1, p/q) from log-probabilities of drafted tokens, elementwise; 0 where p is 0."""
    return (target_logp - draft_logp).clamp(max=0).exp()


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm((p - q)_+) over the last dimension; p itself where nothing is left (q covers p, up to rounding)."""
    rest = (p - q).clamp(min=0)
    mass = rest.sum(-1, keepdim=True)
    return torch.where(mass > 0, rest / mass.clamp(min=torch.finfo(p.dtype).tiny), p)


def verify_rejection(
    chain: Chain, logits: Tensor, draft_ids: Tensor, temperature: float, generator: torch.Generator | None
) -> Verdict:
    """Accept a prefix of a sampled chain.

    Args:
        chain: what was drafted, at the same temperature.
        logits: the target's at the root and every drafted token, [B, K + 1, V].
        draft_ids: target token of every draft row, [Vd].
        temperature: > 0.
    """
    p = (logits.float() / temperature).softmax(-1)  # [B, K + 1, V]
    B, K = chain.draft_logp.shape[:2]
    q = torch.zeros_like(p).index_copy_(-1, draft_ids, torch.nn.functional.pad(chain.draft_logp.exp(), (0, 0, 0, 1)))
    drafted = chain.tree.tokens[:, 1:, None]  # [B, K, 1]
    target_logp, draft_logp = (x[:, :K].gather(-1, drafted)[..., 0].log() for x in (p, q))
    u = torch.rand(B, K, device=p.device, generator=generator)
    kept = (u < acceptance(target_logp, draft_logp)).long().cumprod(1).sum(1)  # [B]
    at = kept[:, None, None].expand(-1, 1, p.shape[-1])
    bonus = torch.multinomial(residual(p.gather(1, at)[:, 0], q.gather(1, at)[:, 0]), 1, generator=generator)
    nodes = torch.arange(int(kept.max()) + 1, device=p.device).expand(B, -1)
    return Verdict(nodes, kept + 1, bonus[:, 0])
