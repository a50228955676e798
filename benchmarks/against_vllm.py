"""vLLM's part of `against.py`, run in vLLM's environment: answers prompts one at a time, T = 0.

    python against_vllm.py JOB

JOB is JSON: `target` (folder), `dtype`, `max_new_tokens`, and, to decode with a drafter, `speculative`: vLLM's
`speculative_config`. A line of input holds the token ids of a prompt; a line of output holds {"tokens", "seconds"}.
"""

import json
import os
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams


def main(job: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints to standard output, which is for answers only
    llm = LLM(
        model=job["target"],
        dtype=job["dtype"],
        max_model_len=2048,
        max_num_seqs=1,
        gpu_memory_utilization=0.3,  # a share of the CPU's memory, too; two instances run
        speculative_config=job.get("speculative"),
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"], detokenize=False)
    for line in sys.stdin:
        start = time.perf_counter()
        output = llm.generate([{"prompt_token_ids": json.loads(line)}], sampling, use_tqdm=False)[0].outputs[0]
        seconds = time.perf_counter() - start
        print(json.dumps({"tokens": list(output.token_ids), "seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
