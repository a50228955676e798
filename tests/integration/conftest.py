"""What the tests against real engines share: vLLM's Python, the target on disk, the exported drafter, prompts."""

import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from setting import (
    CHATS,
    DRAFTER,
    ENVIRONMENT,
    HERE,
    LENGTH,
    PROMPTS,
    QUESTIONS,
    REPOSITORY,
    SHOWN,
    SKIPPED,
    TEXT,
    Asked,
    speculative,
)
from vsd.data import prompt_inputs, read_conversations
from vsd.data.pictures import as_request
from vsd.drafters.eagle3 import Eagle3Drafter
from vsd.drafters.load import adopted_drafter, read_drafter
from vsd.export import export_drafter
from vsd.pictures import render, scene
from vsd.targets import Inputs, Target, load_target
from vsd.targets.images import Picture
from vsd.targets.load import EMBEDDED_VISION, resolve


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
def seeing() -> Target:
    """The target that reads images."""
    return load_target(EMBEDDED_VISION, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def exported(
    targets: dict[str, Target], seeing: Target, target_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The committed drafter in the formats that vLLM reads; `whole`, for the whole vocabulary; `lm`, a draft model;
    `seeing`, for the target that reads images."""
    folder, target = tmp_path_factory.mktemp("exported"), targets["float32"]
    drafter = read_drafter(DRAFTER, target)
    found = {kind: export_drafter(drafter, target, folder / kind, kind) for kind in ("vllm", "speculators")}
    found["whole"] = export_drafter(whole_vocabulary(drafter), target, folder / "whole", "vllm")
    write_shortened(target_folder, folder / "shortened")
    found["lm"] = export_drafter(read_drafter(folder / "shortened", target), target, folder / "lm", "vllm")
    found["seeing"] = export_drafter(adopted_drafter(DRAFTER, seeing)[0], seeing, folder / "seeing", "vllm")
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
def asked(targets: dict[str, Target], seeing: Target, target_folder: str, prompts: list[list[int]]) -> Any:
    """What is asked, by drafter (a key of `exported`): `seeing` has chats about rendered pictures, and some without."""
    chats = [chat(n) for n in range(CHATS)]
    inputs = [prompt_inputs(seeing.tokenizer, messages, seeing.images) for messages in chats]
    text = Asked(target_folder, targets, prompts, [Inputs(ids) for ids in prompts])
    pictures = Asked(resolve(EMBEDDED_VISION), {"float32": seeing}, [as_request(one) for one in chats], inputs)
    return lambda kind: pictures if kind == "seeing" else text


def chat(n: int) -> list[dict[str, Any]]:
    """The n-th chat: a question behind pictures of its own."""
    count = SHOWN[n % len(SHOWN)]
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture(n + CHATS * i)} for i in range(count)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTIONS[n % len(QUESTIONS)]}]}]


def picture(seed: int) -> Picture:
    file = io.BytesIO()
    render(scene(seed)).save(file, "PNG")
    return Picture.of(file.getvalue())


@pytest.fixture(scope="session")
def served(in_vllm: Any, asked: Any, exported: dict[str, Path], tmp_path_factory: Any) -> Any:
    """vLLM's answers to what a drafter (a key of `exported`) is asked, with k drafted tokens or, with 0, without it."""
    done: dict[Any, dict[str, Any]] = {}

    def serve(kind: str, k: int, dtype: str) -> dict[str, Any]:
        folder, _, prompts, _ = asked(kind)
        key = folder, kind if k else None, k, dtype
        if key not in done:
            job = {"target": folder, "dtype": dtype, "prompts": prompts, "max_new_tokens": LENGTH}
            if k:
                job |= {"speculative": speculative(exported[kind], k)}
            files = tmp_path_factory.mktemp("served")
            (files / "job.json").write_text(json.dumps(job))
            in_vllm("serve_in_vllm.py", files / "job.json", files / "result.json")
            done[key] = json.loads((files / "result.json").read_text())
        return done[key]

    return serve
