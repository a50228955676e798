"""The engine behind `model.generate(..., custom_generate=...)`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vsd.decoding.engine import Engine, Result, Sampling
from vsd.drafters import Eagle3Drafter
from vsd.errors import VSDError
from vsd.paths import TreeShape
from vsd.targets import Target


def speculative(
    target: Target,
    drafter: Eagle3Drafter,
    shape: TreeShape | None = None,
    verification: str = "auto",
    streamer: Any = None,
) -> Callable[..., Tensor]:
    """A decoding method for transformers: `target.model.generate(ids, custom_generate=speculative(target, drafter))`.

    Honoured: `max_new_tokens`/`max_length`, `do_sample` and `temperature`, `eos_token_id`, `pad_token_id`,
    `attention_mask` of left-padded batches. Sampling is seeded from torch's global generator. Give a streamer to this
    function: transformers does not hand the one given to `generate` to a decoding method of one's own.

    Raises:
        VSDError: on logits processors and stopping criteria that would change the output's law (top-p, penalties, …).
    """
    engine = Engine(target, drafter, shape, verification)

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **inputs: Any,
    ) -> Tensor:
        config = generation_config
        _refuse_unsupported(config, logits_processor, stopping_criteria)
        mask = inputs.get("attention_mask")  # not a parameter: transformers would pass it twice
        mask = torch.ones_like(input_ids) if mask is None else mask
        prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask)]
        eos = config.eos_token_id
        sampling = Sampling(
            max_new_tokens=config.max_length - input_ids.shape[1],
            temperature=float(config.temperature or 1.0) if config.do_sample else 0.0,
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            seed=int(torch.randint(2**31, ())) if config.do_sample else 0,
        )
        results = [Result(prompt) for prompt in prompts]
        if streamer is not None:
            streamer.put(input_ids.cpu())  # as `generate` does: streamers can skip the prompt
        for step in engine.stream(results, sampling):
            if streamer is not None:
                for token in step.tokens.get(0, []):
                    streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        return _padded(input_ids, results, config.pad_token_id)

    return decode


def _refuse_unsupported(config: Any, processors: Any, criteria: Any) -> None:
    """Temperature, length and EOS are handled by the engine; all else would have to run at each tree node."""
    names = [type(p).__name__ for p in processors or [] if type(p).__name__ != "TemperatureLogitsWarper"]
    if names:
        raise VSDError(
            f"speculative decoding does not apply {', '.join(names)} yet: switch it off (top_k=0, top_p=1.0)"
        )
    names = [type(c).__name__ for c in criteria or []]
    names = [name for name in names if name not in ("MaxLengthCriteria", "EosTokenCriteria")]
    if names:
        raise VSDError(f"speculative decoding does not apply {', '.join(names)} yet: leave it out")
    if config.num_beams not in (None, 1) or (config.num_return_sequences or 1) != 1:
        raise VSDError("speculative decoding returns one sequence a prompt, without beam search")


def _padded(input_ids: Tensor, results: list[Result], pad: int | None) -> Tensor:
    """Prompts and answers as transformers returns them, right-padded [B, T]."""
    longest = max(len(result.tokens) for result in results)
    answers = input_ids.new_full((len(results), longest), pad or 0)
    for row, result in zip(answers, results):
        row[: len(result.tokens)] = torch.tensor(result.tokens, dtype=row.dtype)
    return torch.cat([input_ids, answers], dim=1)
