"""DSpark drafter: DFlash, with a low-rank bias from the token before (a Markov chain along the block).

    logits_t = lm_head(state_t) + markov_w2 markov_w1[z_{t-1}]

The states of a block come from one pass (see `vsd.drafters.dflash.model`), so paths are drawn and scored, and trees
grown, without another; z_0 is the root. The root's own position predicts the first token. Released drafters also have a
confidence head, which only their engine's scheduler reads; `TreeShape.p_min` ends a block early by q itself.

Legend: B batch, W nodes, h hidden, r rank, V target and Vd draft vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vsd.drafters.dflash.model import DFlashConfig, DFlashDrafter


class DSparkConfig(DFlashConfig):
    """Sizes of a DSpark drafter, and which target it belongs to."""

    model_type = "vsd_dspark"

    sample_from_anchor: bool = True
    markov_rank: int = 256


class MarkovHead(nn.Module):
    """Logit bias of rank r by the token before."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.draft_vocab_size, bias=False)


class DSparkDrafter(DFlashDrafter):
    """The drafter; see the module's docstring for the equations."""

    title = "DSpark drafter"
    config_class = DSparkConfig

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        self.markov_head = MarkovHead(config)
        self.post_init()
        with torch.no_grad():  # a new drafter is DFlash's, and its bias has a gradient
            self.markov_head.markov_w2.weight.zero_()

    def joined(self, states: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parallel.joined`: r further columns, [..., h + r] and [Vd, h + r]."""
        bias = self.markov_head
        head: Any = self.lm_head.weight
        wide = torch.cat([states, bias.markov_w1(before).to(states.dtype)], dim=-1)
        return wide, torch.cat([head.to(states.dtype), bias.markov_w2.weight], dim=-1)

    def log_probs(self, states: Tensor, before: Tensor) -> Tensor:
        """See `Parallel.log_probs`."""
        bias = self.markov_head.markov_w2(self.markov_head.markov_w1(before))
        log_q: Tensor = (self.lm_head(states).float() + bias.float()).log_softmax(-1)
        return log_q
