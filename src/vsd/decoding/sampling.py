"""Sampling settings and end conditions of a request."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vsd.errors import VSDError
from vsd.targets import Target
from vsd.verification import Law

Processor = Callable[[Any, Tensor], Tensor]  # (history [1, T], scores [1, V]) -> scores


@dataclass(frozen=True)
class Sampling:
    """Sampling settings and end conditions of an answer. Temperature 0 is greedy and ignores top_p, top_k and min_p.

    Attributes:
        temperature: 0 is greedy.
        eos_ids: tokens that end an answer; None for the target's EOS tokens, () for none.
        stop: strings that end an answer; the token that completes a string is the last token.
        seed: random seed. The samples do not depend on the batch; with the rules `greedy` and `target` they do not
            depend on the drafts, and with `rejection` only their distribution does not. With `target` the answer is,
            token for token, that of transformers' `generate` after `torch.manual_seed(seed)`.
        top_p: sample from the most likely tokens whose total probability reaches this value; 1 keeps all tokens.
        top_k: sample from the k most likely tokens; 0 keeps all tokens.
        min_p: minimum probability of a token, relative to the most likely token.
        repetition_penalty: values above 1 make tokens of prompt and answer less likely.
        logit_bias: value added to the logit, by token id.
        processors: logits processors; each maps a history [1, T] and the scores [1, V] of the next token to new
            scores. Called once per token, in text order; a stateful processor needs a separate `Sampling` per request.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    eos_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    processors: tuple[Processor, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0 or self.temperature < 0:
            raise VSDError("max_new_tokens and temperature must not be negative")
        for name, fits, wanted in (
            ("temperature", math.isfinite(self.temperature), "finite"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 is none"),
        ):
            if not fits:
                raise VSDError(f"{name} must be {wanted}, not {getattr(self, name)}")

    def ends(self, target: Target) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(target.eos_ids if self.eos_ids is None else self.eos_ids)

    def law(self, target: Target) -> Law:
        """The token distribution of this request.

        Raises:
            VSDError: `logit_bias` names a token the target does not have.
        """
        unknown = [token for token in self.logit_bias if not 0 <= token < target.vocab_size]
        if unknown:
            raise VSDError(f"logit_bias names token {unknown[0]}; the target has tokens 0 to {target.vocab_size - 1}")
        generator = None
        if self.temperature > 0:
            generator = torch.Generator(target.device).manual_seed(self.seed)
        return Law(self.pipeline(), self.temperature, generator, self.ends(target))

    def pipeline(self) -> LogitsProcessorList:
        """All logits processors, in the order of transformers' `generate`."""
        steps: list[Processor] = []
        if self.logit_bias:
            bias = {(int(token),): float(value) for token, value in self.logit_bias.items()}
            steps.append(SequenceBiasLogitsProcessor(bias))  # type: ignore[arg-type]
        if self.repetition_penalty != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        steps += self.processors
        if self.temperature > 0:
            if self.temperature != 1:
                steps.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k > 0:
                steps.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                steps.append(TopPLogitsWarper(self.top_p))
            if self.min_p > 0:
                steps.append(MinPLogitsWarper(self.min_p))
        return LogitsProcessorList(steps)
