"""Runs in vLLM's environment, not in ours: the tokens that vLLM drafts in every pass, prompt by prompt.

    python draft_in_vllm.py JOB.json RESULT.json

JOB: `target` (folder), `prompts` (token ids), `max_new_tokens`, `speculative`: vLLM's `speculative_config`. RESULT:
`tokens` of every answer; `drafts`: of every prompt, a list of drafts in the order of the passes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the proposer is called in this process

from vllm import LLM, SamplingParams
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer


def main(job_file: str, result_file: str) -> None:
    job, drafts = json.loads(Path(job_file).read_text()), list[list[int]]()
    propose = SpecDecodeBaseProposer.propose

    def recorded(self: Any, *args: Any, **options: Any) -> Any:
        found = propose(self, *args, **options)
        drafts.append(found.tolist()[0])
        return found

    SpecDecodeBaseProposer.propose = recorded  # type: ignore[method-assign]
    llm = LLM(
        model=job["target"],
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=1,
        enforce_eager=True,
        speculative_config=job["speculative"],
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"], detokenize=False)
    result: dict[str, list[Any]] = {"tokens": [], "drafts": []}
    for ids in job["prompts"]:
        drafts.clear()
        (answer,) = llm.generate([{"prompt_token_ids": ids}], sampling)
        result["tokens"].append(list(answer.outputs[0].token_ids))
        result["drafts"].append(list(drafts))
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
