"""DFlash2 drafter: DFlash with short convolutions along the block, and a selector over the likeliest tokens.

Convolutions stand before and after attention and MLP, in every layer. The kernel of a token has a common part and one
that its own state gives, for groups of channels; T taps reach back T - 1 tokens, not beyond the root:

    conv(x)_t = Σ_{i<T} (base_i + δ_{t,i}) ⊙ x_{t-i}
    y = conv_out(Attn(conv_in(a))),   [δ_in ; δ_out] = kernel_projection(a),   a = input_layernorm(x)

The selector picks a path through the lattice of the n = 16 likeliest tokens a position (`vsd.drafters.lattice`):

    q(z_t | x, z_{t-1}) ∝ exp(u_t(z_t) + successor[z_t] · (predecessor[z_{t-1}] ⊙ hidden_projection(state_t)))

with u = lm_head(state); z_0 is the root. At temperature 0 the best candidate is drawn, above it q at the temperature.
A new drafter's convolutions are the identity, so that it is DFlash's.

Follows vLLM 0.32 (`model_executor/models/qwen3_dflash2.py`, `v1/worker/gpu/spec_decode/dflash2/speculator.py`), which
draws from q only in probabilistic drafting and otherwise takes the best candidate. It knows no pruned vocabulary.

Legend: B batch, P paths, J queries of a block, W nodes, h hidden, G groups of channels, T taps, n candidates, r rank,
V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsd.drafters.dflash.model import DFlashConfig, DFlashDrafter, DFlashLayer
from vsd.drafters.lattice import Head, Lattice, candidates, whole
from vsd.drafters.vocabulary import DraftVocabulary
from vsd.targets import TargetInfo


class DFlash2Config(DFlashConfig):
    """Sizes of a DFlash2 drafter, and which target it belongs to."""

    model_type = "vsd_dflash2"

    conv_kernel_size: int = 2
    conv_group_size: int = 16
    selector_rank: int = 256
    selector_top_k: int = 16


class GroupedConvolution(nn.Module):
    """The convolutions before and after a sublayer."""

    def __init__(self, config: DFlash2Config) -> None:
        super().__init__()
        h, taps, group = config.hidden_size, config.conv_kernel_size, config.conv_group_size
        if h % group:
            raise ValueError(f"conv_group_size {group} does not divide hidden_size {h}")
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, h))
        self.kernel_projection = nn.Linear(h, 2 * taps * (h // group), bias=False)

    @torch.no_grad()
    def reset(self) -> None:
        """Make both the identity."""
        self.base_kernel.zero_()[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def forward(self, x: Tensor, queries: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        """x [B, P J, h] -> both convolutions around `run`, within blocks of J = `queries`."""
        (_, taps, h), blocks = self.base_kernel.shape, x.unflatten(1, (-1, queries))  # [B, P, J, h]
        before, after = self.kernel_projection(blocks).unflatten(-1, (2, taps, -1)).unbind(-3)  # [B, P, J, T, G]
        y = run(convolved(blocks, self.base_kernel[0], before).flatten(1, 2))
        return convolved(y.view(*blocks.shape[:-1], h), self.base_kernel[1], after).flatten(1, 2)


def convolved(x: Tensor, base: Tensor, own: Tensor) -> Tensor:
    """Blocks x [..., J, h], kernels base [T, h] and own [..., J, T, G] -> [..., J, h]."""
    J, groups = x.shape[-2], own.shape[-1]
    x = x.unflatten(-1, (groups, -1))  # [..., J, G, h / G]
    kernel = base.unflatten(-1, (groups, -1)) + own[..., None]  # [..., J, T, G, h / G]
    shifted = [F.pad(x, (0, 0, 0, 0, tap, 0))[..., :J, :, :] for tap in range(len(base))]
    return torch.stack([kernel[..., tap, :, :] * some for tap, some in enumerate(shifted)]).sum(0).flatten(-2)


class DFlash2Layer(DFlashLayer):
    """A decoder layer with convolutions around attention and MLP."""

    def __init__(self, config: DFlash2Config) -> None:
        super().__init__(config)
        self.attention_conv = GroupedConvolution(config)
        self.mlp_conv = GroupedConvolution(config)

    def around_attention(self, x: Tensor, queries: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        """See `DFlashLayer.around_attention`."""
        output: Tensor = self.attention_conv(x, queries, run)
        return output

    def around_mlp(self, x: Tensor, queries: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        """See `DFlashLayer.around_mlp`."""
        output: Tensor = self.mlp_conv(x, queries, run)
        return output


class CandidateSelector(nn.Module):
    """Scores of a token by the token before and the state."""

    def __init__(self, config: DFlash2Config) -> None:
        super().__init__()
        std, size = config.initializer_range, (config.vocab_size, config.selector_rank)
        self.predecessor_codebook = nn.Parameter(torch.randn(size) * std)
        self.successor_codebook = nn.Parameter(torch.randn(size) * std)
        self.hidden_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)

    def context(self, states: Tensor, before: Tensor) -> Tensor:
        """[..., r] of states [..., h] behind tokens [...]; both may broadcast."""
        projected: Tensor = self.hidden_projection(states)
        return self.predecessor_codebook[before].to(projected.dtype) * projected


class DFlash2Drafter(DFlashDrafter):
    """The drafter; see the module's docstring for the equations."""

    title = "DFlash2 drafter"
    config_class = DFlash2Config
    layer_class = DFlash2Layer

    def __init__(self, config: DFlash2Config) -> None:
        if config.draft_vocab_size != config.vocab_size:
            raise ValueError(f"DFlash2 drafts all {config.vocab_size} tokens, not {config.draft_vocab_size}")
        if not 0 < config.selector_top_k <= config.vocab_size:
            raise ValueError(f"selector_top_k {config.selector_top_k} does not fit {config.vocab_size} tokens")
        super().__init__(config)
        self.candidate_selector = CandidateSelector(config)
        self.post_init()
        for module in self.modules():
            if isinstance(module, GroupedConvolution):
                module.reset()

    @classmethod
    def for_target(cls, target: TargetInfo, vocabulary: DraftVocabulary, **overrides: Any) -> "DFlash2Drafter":
        """See `DFlashDrafter.for_target`.

        Args:
            vocabulary: not used: the drafter proposes every token.
        """
        every = DraftVocabulary(torch.arange(target.vocab_size), target.vocab_size)
        drafter: Any = super().for_target(target, every, **overrides)
        own: DFlash2Drafter = drafter
        return own

    def joined(self, states: Tensor, before: Tensor) -> tuple[Tensor, Head]:
        """See `Parallel.joined`: states [..., h + r] and a lattice."""
        selector = self.candidate_selector
        head: Any = self.lm_head.weight
        wide = torch.cat([states, selector.context(states, before).to(states.dtype)], dim=-1)
        return wide, Lattice(head, selector.successor_codebook, self.config.selector_top_k)

    def log_probs(self, states: Tensor, before: Tensor) -> Tensor:
        """See `Parallel.log_probs`; -inf for tokens that are no candidates."""
        selector, unary = self.candidate_selector, self.lm_head(states).float()
        context = selector.context(states, before)
        found = candidates(unary, context, selector.successor_codebook, self.config.selector_top_k)
        log_q: Tensor = whole(found, unary.shape[-1]).log_softmax(-1)
        return log_q
