"""Runs in vLLM's environment, not in ours: serve one target at temperature 0, with or without a drafter.

    python serve_in_vllm.py JOB.json RESULT.json

JOB: `target` (folder), `dtype`, `prompts` (token ids, or messages of a chat), `max_new_tokens`, and, to decode with a
drafter, `speculative`: vLLM's `speculative_config`.
RESULT: `prompts`, the token ids that were read; `tokens` of every answer; without a drafter `top`, for every token the
two likeliest ids with their log-probs; with one the counters of `vllm:spec_decode_*`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process, and with its modules

from transformers.models.pixtral import image_processing_pil_pixtral
from vllm import LLM, ModelRegistry, SamplingParams


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    speculative = job.get("speculative")
    register_llava()
    llm = LLM(
        model=job["target"],
        dtype=job["dtype"],
        max_model_len=1024,
        max_num_seqs=8,
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config=speculative,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=job["max_new_tokens"], detokenize=False, logprobs=None if speculative else 2
    )
    outputs = answered(llm, job["prompts"], sampling)
    answers = [output.outputs[0] for output in outputs]
    result: dict[str, Any] = {
        "prompts": [list(output.prompt_token_ids) for output in outputs],
        "tokens": [list(answer.token_ids) for answer in answers],
    }
    if speculative:
        result |= counters(llm)
    else:
        result["top"] = [[best_two(position) for position in answer.logprobs] for answer in answers]
    Path(result_file).write_text(json.dumps(result))


def register_llava() -> None:
    """vLLM's LLaVA class, which imports a module that needs torchvision: its twin on Pillow takes its place."""
    sys.modules["transformers.models.pixtral.image_processing_pixtral"] = image_processing_pil_pixtral
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    ModelRegistry.register_model("LlavaForConditionalGeneration", LlavaForConditionalGeneration)


def answered(llm: LLM, prompts: list[list[Any]], sampling: SamplingParams) -> list[Any]:
    """vLLM's outputs for prompts of token ids, or for chats."""
    if isinstance(prompts[0][0], dict):
        return list(llm.chat(prompts, sampling))
    return list(llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling))


def counters(llm: LLM) -> dict[str, Any]:
    """Verification passes, drafted and accepted tokens, accepted tokens by draft position."""
    found = {metric.name: metric for metric in llm.get_metrics() if metric.name.startswith("vllm:spec_decode")}
    return {
        "passes": found["vllm:spec_decode_num_drafts"].value,
        "drafted": found["vllm:spec_decode_num_draft_tokens"].value,
        "accepted": found["vllm:spec_decode_num_accepted_tokens"].value,
        "by_position": found["vllm:spec_decode_num_accepted_tokens_per_pos"].values,
    }


def best_two(position: Any) -> list[tuple[int, float]]:
    ranked = sorted(position.items(), key=lambda item: item[1].rank)
    return [(token, entry.logprob) for token, entry in ranked[:2]]


if __name__ == "__main__":
    main(*sys.argv[1:])
