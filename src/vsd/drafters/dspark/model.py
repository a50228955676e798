"""DSpark drafter: DFlash, with a low-rank bias from the token before (a Markov chain along the block).

    logits_t = lm_head(state_t) + markov_w2 markov_w1[z_{t-1}]

The states of a block come from one pass (see `vsd.drafters.dflash.model`), so paths are drawn and scored, and trees
grown, without another; z_0 is the root. The root's own position predicts the first token.

A confidence head predicts whether the token drafted at a state is accepted, if all before it are:

    c_t = sigmoid(w · [state_t ; markov_w1[z_{t-1}]] + b)

It is trained as calibrated acceptance (`vsd.objective.confidence`) and trains nothing else. `TreeShape.p_min` ends a
block where the product of confidences falls below it (`vsd.drafters.proposals`); vLLM 0.32's scheduler reads the head,
too (`DSparkConfidenceHead` in `qwen3_dspark.py`).

Legend: B batch, W nodes, h hidden, r rank, V target and Vd draft vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsd.drafters.dflash.model import DFlashConfig, DFlashDrafter
from vsd.drafters.lattice import Head
from vsd.drafters.proposals import Conditional


class DSparkConfig(DFlashConfig):
    """Sizes of a DSpark drafter, and which target it belongs to."""

    model_type = "vsd_dspark"

    sample_from_anchor: bool = True
    markov_rank: int = 256
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True


class MarkovHead(nn.Module):
    """Logit bias of rank r by the token before."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.draft_vocab_size, bias=False)


class ConfidenceHead(nn.Module):
    """Logit of the acceptance, from the state and, unless switched off, the Markov embedding of the token before."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.width = config.hidden_size + (config.markov_rank if config.confidence_head_with_markov else 0)
        self.proj = nn.Linear(self.width, 1)

    def forward(self, states: Tensor) -> Tensor:
        """[..., h + r] -> [...]."""
        logits: Tensor = self.proj(states[..., : self.width])[..., 0]
        return logits


class DSparkDrafter(DFlashDrafter):
    """The drafter; see the module's docstring for the equations."""

    title = "DSpark drafter"
    config_class = DSparkConfig

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        self.markov_head = MarkovHead(config)
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
        self.post_init()
        with torch.no_grad():  # a new drafter is DFlash's, and its bias has a gradient
            self.markov_head.markov_w2.weight.zero_()

    def joined(self, states: Tensor, before: Tensor) -> tuple[Tensor, Head]:
        """See `Parallel.joined`: r further columns, [..., h + r] and [Vd, h + r]."""
        head: Any = self.lm_head.weight
        weight = torch.cat([head.to(states.dtype), self.markov_head.markov_w2.weight], dim=-1)
        return self._wide(states, before), weight

    def confidence(self, states: Tensor) -> Tensor | None:
        """See `Drafter.confidence`; states [..., h + r] are those of `joined`."""
        return None if self.confidence_head is None else self.confidence_head(states)

    def conditional(self, states: Tensor, before: Tensor) -> Conditional:
        """See `Parallel.conditional`."""
        logits = self.confidence(self._wide(states.expand(-1, before.shape[1], -1), before))
        log_c = None if logits is None else F.logsigmoid(logits.float())
        return Conditional(self.log_probs(states, before), log_c)

    def log_probs(self, states: Tensor, before: Tensor) -> Tensor:
        """See `Parallel.log_probs`."""
        bias = self.markov_head.markov_w2(self.markov_head.markov_w1(before))
        log_q: Tensor = (self.lm_head(states).float() + bias.float()).log_softmax(-1)
        return log_q

    def _wide(self, states: Tensor, before: Tensor) -> Tensor:
        """States [..., h] and the embeddings of tokens [...] before them, [..., h + r]."""
        return torch.cat([states, self.markov_head.markov_w1(before).to(states.dtype)], dim=-1)
