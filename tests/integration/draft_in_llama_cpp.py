"""Runs in llama.cpp's environment, not in ours: answer prompts at temperature 0, with or without a drafter.

    python draft_in_llama_cpp.py JOB.json RESULT.json

JOB: `target` (GGUF), `drafter` (GGUF or null), `k` (drafted tokens), `prompts` (token ids), `max_new_tokens`.
RESULT: for every prompt `content`, and with a drafter `drafted` and `accepted` tokens.
"""

import json
import sys
from pathlib import Path

import xllamacpp


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = job["target"], 1024, 1, False
    if job["drafter"] is not None:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3]
        params.speculative.draft.mparams.path, params.speculative.draft.n_max = job["drafter"], job["k"]
    server = xllamacpp.Server(params)
    result = []
    for ids in job["prompts"]:
        asked = {
            "prompt": ids,
            "temperature": 0,
            "max_tokens": job["max_new_tokens"],
            "n_predict": job["max_new_tokens"],
        }
        answer = server.handle_completions(asked)
        timings = answer["timings"]
        result.append(
            {
                "content": answer["choices"][0]["text"] if "choices" in answer else answer["content"],
                "drafted": timings.get("draft_n"),
                "accepted": timings.get("draft_n_accepted"),
            }
        )
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
