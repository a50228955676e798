"""What the tests against real engines share: vLLM's Python, the target on disk, the exported drafter, prompts."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from setting import DRAFTER, ENVIRONMENT, HERE, LENGTH, PROMPTS, REPOSITORY, SKIPPED, TEXT, speculative
from vsd.data import prompt_inputs, read_conversations
from vsd.drafters.eagle3 import Eagle3Drafter
from vsd.drafters.load import read_drafter
from vsd.export import export_drafter
from vsd.targets import Target, load_target
from vsd.targets.load import resolve


@pytest.fixture(scope="session")
def vllm_bin() -> Path:
    """The folder of vLLM's own environment that holds `python` and `vllm`."""
    folder = Path(os.environ.get("VSD_VLLM", REPOSITORY / ".venv-vllm")) / "bin"
    assert (folder / "vllm").exists(), "no vLLM: run `make integration`, which installs it"
    return folder


@pytest.fixture(scope="session")
def in_vllm(vllm_bin: Path) -> Any:
    """Runs a script of this folder in vLLM's environment; its output is shown if it fails."""

    def run(script: str, *arguments: object) -> None:
        command = [str(vllm_bin / "python"), str(HERE / script), *map(str, arguments)]
        done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    return run


@pytest.fixture(scope="session")
def target_folder() -> str:
    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def targets() -> dict[str, Target]:
    """The target in both precisions that it is served in."""
    return {dtype: load_target(dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16")}


@pytest.fixture(scope="session")
def exported(
    targets: dict[str, Target], target_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The committed drafter in the formats that vLLM reads; `whole`, for the whole vocabulary; `lm`, a draft model."""
    folder, target = tmp_path_factory.mktemp("exported"), targets["float32"]
    drafter = read_drafter(DRAFTER, target)
    found = {kind: export_drafter(drafter, target, folder / kind, kind) for kind in ("vllm", "speculators")}
    found["whole"] = export_drafter(whole_vocabulary(drafter), target, folder / "whole", "vllm")
    write_shortened(target_folder, folder / "shortened")
    found["lm"] = export_drafter(read_drafter(folder / "shortened", target), target, folder / "lm", "vllm")
    return found


def write_shortened(target_folder: str, folder: Path) -> None:
    """A draft model that needs no training: the target without some of its middle layers, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    del model.model.layers[SKIPPED]
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(folder)


def whole_vocabulary(drafter: Eagle3Drafter) -> Eagle3Drafter:
    """The same drafter with a row for every token: zeros for those it did not know."""
    config = type(drafter.config)(**{**drafter.config.to_dict(), "draft_vocab_size": drafter.config.vocab_size})
    whole = Eagle3Drafter(config).to(drafter.dtype).eval()  # type: ignore[arg-type]
    state = drafter.state_dict()
    head = torch.zeros_like(whole.lm_head.weight).index_copy_(0, drafter.vocabulary.ids, state["lm_head.weight"])
    d2t, t2d = torch.zeros_like(whole.d2t), torch.ones_like(whole.t2d)
    whole.load_state_dict({**state, "lm_head.weight": head, "d2t": d2t, "t2d": t2d})
    return whole


@pytest.fixture(scope="session")
def prompts(targets: dict[str, Target]) -> list[list[int]]:
    """First user turns of the package's own text, evenly spread; `VSD_PROMPTS` names another file."""
    source = os.environ.get("VSD_PROMPTS", TEXT)
    users = [
        [m for m in conversation.messages if m["role"] == "user"][:1]
        for conversation in read_conversations(source, need_answer=False)
    ]
    picked = [users[i * len(users) // PROMPTS] for i in range(PROMPTS)]
    return [prompt_inputs(targets["float32"].tokenizer, messages).ids for messages in picked]


@pytest.fixture(scope="session")
def served(
    in_vllm: Any, target_folder: str, exported: dict[str, Path], prompts: list[list[int]], tmp_path_factory: Any
) -> Any:
    """What vLLM makes of the prompts, by drafter (a key of `exported`, or None), k and precision; each once."""
    done: dict[Any, dict[str, Any]] = {}

    def serve(kind: str | None, k: int, dtype: str) -> dict[str, Any]:
        if (kind, k, dtype) not in done:
            folder = tmp_path_factory.mktemp("served")
            job = {"target": target_folder, "dtype": dtype, "prompts": prompts, "max_new_tokens": LENGTH}
            if kind is not None:
                job |= {"speculative": speculative(exported[kind], k)}
            (folder / "job.json").write_text(json.dumps(job))
            in_vllm("serve_in_vllm.py", folder / "job.json", folder / "result.json")
            done[kind, k, dtype] = json.loads((folder / "result.json").read_text())
        return done[kind, k, dtype]

    return serve
