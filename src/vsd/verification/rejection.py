"""Rule `rejection`: speculative sampling of a drafted chain (Leviathan et al., 2211.17192; Chen et al., 2302.01318).

Token t is accepted with probability min(1, p_t(z_t) / q_t(z_t)); at the first rejection the bonus token is drawn from
norm((p - q)_+), after a chain accepted whole from p. The output's law is exactly p for any q: at every token the rule
couples a draw from p with the drafter's draw from q, so that they are equal with the highest possible probability.

Legend: R rows, V target vocabulary.
"""

import torch
from torch import Tensor

from vsd.targets.sampling import Generators, draw


def acceptance(target_logp: Tensor, draft_logp: Tensor) -> Tensor:
    """min(1, p/q) from log-probabilities of drafted tokens, elementwise; 0 where p is 0."""
    return (target_logp - draft_logp).clamp(max=0).exp()


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm((p - q)_+) over the last dimension; p itself where no mass is left (q covers p, up to rounding)."""
    rest = (p - q).clamp(min=0)
    mass = rest.sum(-1, keepdim=True)
    return torch.where(mass > 0, rest / mass.clamp(min=torch.finfo(p.dtype).tiny), p)


def couple(p: Tensor, q: Tensor, drafted: Tensor, generators: Generators) -> Tensor:
    """Tokens [R] of law p [R, V]: the drafted tokens [R] of law q [R, V] if accepted, else draws from the residual.

    A row without a generator has a point mass as p, so its outcome is deterministic.
    """
    target_logp, draft_logp = (x.gather(-1, drafted[:, None])[:, 0].log() for x in (p, q))
    u = [0.5 if g is None else float(torch.rand((), device=p.device, generator=g)) for g in generators]
    kept = torch.tensor(u, device=p.device) < acceptance(target_logp, draft_logp)
    tokens = drafted.clone()
    if not bool(kept.all()):
        others = [generator for generator, keep in zip(generators, kept.tolist()) if not keep]
        tokens[~kept] = draw(residual(p[~kept], q[~kept]), others)
    return tokens
