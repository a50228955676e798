"""What a frozen language model says behind a picture, and behind a caption: several answers in one pass.

Answers are branches behind one picture: each sees the prompt up to the picture, and itself.

Legend: P positions of the picture (or tokens of a caption), N tokens of the pass, A answer tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Said(NamedTuple):
    """A question about a picture and an answer, as token ids; the answer has its end token if it ends."""

    question: str
    answer: list[int]


class Speech:
    """A frozen language model that answers from embeddings of what it is shown."""

    def __init__(self, language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.language, self.tokenizer = language.requires_grad_(False), tokenizer

    def embed(self, ids: Sequence[int]) -> Tensor:
        """[N, h]."""
        embedded: Tensor = self.language.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
        return embedded

    def caption(self, text: str) -> Tensor:
        """Embeddings of a caption, [P, h]."""
        return self.embed(self.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids before and behind the picture."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"\0\n{question}"}], tokenize=False, add_generation_prompt=True
        )
        before, behind = (self.tokenizer.encode(part, add_special_tokens=False) for part in str(text).split("\0"))
        return before, behind

    def log_probs(self, shown: Tensor, said: Sequence[Said]) -> Tensor:
        """Log-probabilities of the answers' tokens, [A, V], behind `shown` [P, h]."""
        before = self.prompt("")[0]
        branches = [self.prompt(one.question)[1] + one.answer for one in said]
        root = len(before) + len(shown)
        parts = [self.embed(before), shown, *(self.embed(branch) for branch in branches)]
        positions = [torch.arange(root), *(torch.arange(root, root + len(branch)) for branch in branches)]
        hidden = self.language.base_model(
            inputs_embeds=torch.cat(parts)[None],
            attention_mask=branching(root, [len(branch) for branch in branches]),
            position_ids=torch.cat(positions)[None],
            use_cache=False,
        ).last_hidden_state[0]
        ends = root + torch.tensor([len(branch) for branch in branches]).cumsum(0)
        rows = [torch.arange(int(end) - len(one.answer) - 1, int(end) - 1) for end, one in zip(ends, said)]
        return F.log_softmax(self.language.get_output_embeddings()(hidden[torch.cat(rows)]), dim=-1)

    def cross_entropy(self, shown: Tensor, said: Sequence[Said]) -> Tensor:
        """Of true answers, a mean over their tokens."""
        return F.nll_loss(self.log_probs(shown, said), torch.tensor([token for one in said for token in one.answer]))

    def divergence(self, shown: Tensor, told: Tensor, said: Sequence[Said]) -> Tensor:
        """KL of what is said behind `shown` from what is said behind `told`, a mean over tokens."""
        with torch.no_grad():
            wanted = self.log_probs(told, said)
        return F.kl_div(self.log_probs(shown, said), wanted, log_target=True, reduction="batchmean")


def branching(root: int, lengths: Sequence[int]) -> Tensor:
    """Additive mask [1, 1, N, N] of a causal trunk of `root` tokens and causal branches behind it."""
    branch = torch.cat([torch.full((n,), k) for k, n in enumerate([root, *lengths])])
    allowed = (branch[:, None] == branch) | (branch == 0)
    allowed &= torch.ones_like(allowed).tril()
    return torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[None, None]
