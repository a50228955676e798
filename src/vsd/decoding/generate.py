"""The engine behind `model.generate(..., custom_generate=...)`.

transformers builds the logits processors (warpers included) and the stopping criteria for the whole batch. In this
engine every row accepts a different number of tokens, so both are called row by row, with one history [1, T], left
padding included. transformers' own loop makes the same calls for a batch of that single row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import ConfidenceCriteria

from vsd.decoding.engine import Engine, Result
from vsd.decoding.sampling import Processor, Sampling
from vsd.drafters import Drafter
from vsd.errors import VSDError
from vsd.paths import TreeShape
from vsd.targets import Inputs, Target

_OF_A_BATCH = (  # their state covers a batch whose rows all advance by one token
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
_BY_THE_ENGINE = (EosTokenCriteria, MaxLengthCriteria)


def speculative(
    target: Target,
    drafter: Drafter,
    shape: TreeShape | None = None,
    verification: str = "auto",
    streamer: Any = None,
) -> Callable[..., Tensor]:
    """A decoding method for transformers: `target.model.generate(ids, custom_generate=speculative(target, drafter))`.

    Supported: length, sampling, EOS and padding of the generation config, left padding, logits processors, stopping
    criteria. Custom processors and criteria are called row by row and must be stateless in a batch. Torch's global
    generator seeds sampling. Pass `streamer` here; `stop_strings` as `StopStringCriteria` in `stopping_criteria`.

    Raises:
        VSDError: beams, several sequences per prompt, outputs other than tokens, or processors tied to a whole batch.
    """
    engine = Engine(target, drafter, shape, verification)

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any = None,
        **inputs: Any,
    ) -> Tensor:
        config = generation_config
        _refuse_unsupported(config, logits_processor, stopping_criteria, len(input_ids))
        if bool((input_ids == getattr(model.config, "image_token_id", -1)).any()):
            raise VSDError("speculative decoding inside `generate` reads text alone: give images to Engine.generate")
        mask = inputs.get("attention_mask")  # not a parameter: transformers would pass it twice
        mask = torch.ones_like(input_ids) if mask is None else mask
        results = [Result(Inputs(row[keep.bool()].tolist())) for row, keep in zip(input_ids, mask)]
        paddings = [row[~keep.bool()] for row, keep in zip(input_ids, mask)]
        eos = tuple(int(t) for c in stopping_criteria if type(c) is EosTokenCriteria for t in c.eos_token_id)
        seeds = torch.randint(2**31, (len(results),)).tolist() if config.do_sample else [0] * len(results)
        samplings = [
            _AsGiven(
                max_new_tokens=(stopping_criteria.max_length or config.max_length) - input_ids.shape[1],
                temperature=float(config.temperature or 1.0) if config.do_sample else 0.0,
                eos_ids=eos,
                seed=seed,
                processors=tuple(_of_row(processor, row, padding) for processor in logits_processor),
            )
            for row, (seed, padding) in enumerate(zip(seeds, paddings))
        ]
        criteria = StoppingCriteriaList(c for c in stopping_criteria if type(c) not in _BY_THE_ENGINE)
        if streamer is not None:
            streamer.put(input_ids.cpu())  # like `generate`: streamers can skip the prompt
        for step in engine.stream(results, samplings):
            for i, tokens in step.tokens.items():
                new = _stop(criteria, paddings[i], results[i], len(tokens))
                if streamer is not None and i == 0:
                    for token in new:
                        streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        return _padded(input_ids, results, config.pad_token_id)

    return decode


class _AsGiven(Sampling):
    """Sampling with the processor list of transformers, temperature and warpers included."""

    def pipeline(self) -> LogitsProcessorList:
        return LogitsProcessorList(self.processors)


def _refuse_unsupported(config: Any, processors: list[Any], criteria: list[Any], rows: int) -> None:
    if config.num_beams not in (None, 1) or (config.num_return_sequences or 1) != 1:
        raise VSDError("speculative decoding returns one sequence a prompt, without beam search")
    if config.return_dict_in_generate:
        raise VSDError("speculative decoding returns tokens only: leave return_dict_in_generate out")
    for processor in processors:
        if rows > 1 and isinstance(processor, _OF_A_BATCH):
            name = type(processor).__name__
            raise VSDError(f"{name} keeps a state of the whole batch, whose rows speed up unequally: one prompt a time")
    if any(isinstance(criterion, ConfidenceCriteria) for criterion in criteria):
        raise VSDError("ConfidenceCriteria reads the scores of an assistant model: leave it out")


def _of_row(processor: Processor, row: int, padding: Tensor) -> Processor:
    """Apply a batch processor to one row; the returned processor takes the history without left padding."""
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        processor = PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(processor.prompt_ignore_length, Tensor):
        processor = RepetitionPenaltyLogitsProcessor(processor.penalty, processor.prompt_ignore_length[row : row + 1])
    if not len(padding):
        return processor
    return lambda ids, scores: processor(torch.cat([padding.to(ids.device)[None], ids], dim=1), scores)


def _stop(criteria: StoppingCriteriaList, padding: Tensor, result: Result, new: int) -> list[int]:
    """End an answer at the first of its last `new` tokens that meets a criterion; return the tokens that remain."""
    start = len(result.tokens) - new
    for end in range(start + 1, len(result.tokens) + 1) if criteria else ():
        ids = torch.cat([padding, padding.new_tensor(result.prompt.ids + result.tokens[:end])])[None]
        if bool(criteria(ids, None).any()):
            del result.tokens[end:]
            result.finish = "stop"
            break
    return result.tokens[start:]


def _padded(input_ids: Tensor, results: list[Result], pad: int | None) -> Tensor:
    """Prompts and answers, right-padded [B, T], the format of transformers."""
    longest = max(len(result.tokens) for result in results)
    answers = input_ids.new_full((len(results), longest), pad or 0)
    for row, result in zip(answers, results):
        row[: len(result.tokens)] = torch.tensor(result.tokens, dtype=row.dtype)
    return torch.cat([input_ids, answers], dim=1)
