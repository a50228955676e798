"""vLLM answers and gives the target's features: those in process, and the same drafter after the same steps."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from setting import ENVIRONMENT, TEXT
from vsd.data import Conversation, Example, ServerTeacher, load_examples, read_conversations, regenerate
from vsd.drafters import new_drafter
from vsd.errors import MismatchError
from vsd.features import FeatureServer, KeepingServer, KeptFeatures, ServedFeatures, TextStore, compute_features
from vsd.features.server import command
from vsd.targets import Inputs, Padded, Target, TargetInfo, load_target_info
from vsd.training import Collator, DraftDataset, VSDConfig, VSDTrainer
from vsd.training.batch import texts_of

LAYERS, DEPTH = (2, 15, 27), 30
TEXTS, CHATS, LENGTH, STEPS = 16, 8, 24, 6


@pytest.fixture(scope="module")
def info() -> TargetInfo:
    return load_target_info("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def url(vllm_bin: Path, target_folder: str) -> Iterator[str]:
    """A server started by the printed command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = tempfile.mkdtemp(prefix="vsd", dir="/dev/shm")
    path, _, _, target, *words = shlex.split(command(target_folder, LAYERS, DEPTH, shared))
    start = [str(vllm_bin / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", target]
    words += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "smollm2", "--dtype", "float32"]
    words += ["--enforce-eager", "--max-model-len", "1024"]
    environment = {**os.environ, **ENVIRONMENT, **dict([path.split("=", 1)])}
    with tempfile.TemporaryFile() as log:
        started = subprocess.Popen([*start, *words], env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until_up(started, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
            shutil.rmtree(shared)


def wait_until_up(started: subprocess.Popen[bytes], port: int, log: Any) -> None:
    deadline = time.monotonic() + 600
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if started.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            pytest.fail(log.read().decode(errors="replace")[-4000:])
        time.sleep(0.5)


@pytest.fixture
def client(url: str, info: TargetInfo) -> Iterator[FeatureServer]:
    found = FeatureServer(url, None, None, info)
    found.check()
    yield found
    found.close()


@pytest.fixture(scope="module")
def examples(info: TargetInfo) -> list[Example]:
    """Short texts of the package's own."""
    found = load_examples(TEXT, info.tokenizer, 2048)
    return [example for example in found if len(example.inputs.ids) < 200][:TEXTS]


def assert_same(source: Any, target: Target, examples: list[Example]) -> None:
    """To float32, in which both compute: features grow to thousands."""
    dataset = DraftDataset(examples)
    for first in range(0, len(examples), 4):
        texts = texts_of(Collator()([dataset[i] for i in range(first, min(first + 4, len(examples)))]))
        ours, theirs = source.batch(texts), compute_features(target, texts.inputs, texts.drafted, LAYERS)
        for b, length in enumerate(texts.inputs.lengths.tolist()):
            scale = float(theirs.aux[b, : length - 1].abs().max())
            torch.testing.assert_close(
                ours.aux[b, : length - 1], theirs.aux[b, : length - 1], rtol=1e-3, atol=1e-5 * scale
            )
        torch.testing.assert_close(ours.hidden[texts.real], theirs.hidden[texts.real], rtol=1e-3, atol=5e-3)
        torch.testing.assert_close(
            ours.log_normaliser[texts.real], theirs.log_normaliser[texts.real], rtol=1e-4, atol=1e-3
        )


def test_features_are_those_in_process(
    client: FeatureServer, targets: dict[str, Target], examples: list[Example]
) -> None:
    assert client.layers == LAYERS
    source = ServedFeatures(client, LAYERS)
    assert_same(source, targets["float32"], examples)


def test_continuations_have_the_states_of_the_target(client: FeatureServer, targets: dict[str, Target]) -> None:
    """vLLM goes on behind texts: states are those of one pass over text and continuation."""
    source, target, count = ServedFeatures(client, LAYERS, temperature=0.7), targets["float32"], 6
    texts = [target.tokenizer.encode(text) for text in ("Once upon a time", "The capital of France is Paris, and the")]
    tokens, hidden, aux = source.continued(texts, count, range(2))
    for n, ids in enumerate(texts):
        whole = target.features(Padded.of([Inputs([*ids, *tokens[n].tolist()])]), LAYERS)
        behind = slice(len(ids) - 1, len(ids) - 1 + count)
        scale = float(whole.aux[0, behind].abs().max())
        torch.testing.assert_close(aux[n], whole.aux[0, behind], rtol=1e-3, atol=1e-5 * scale)
        torch.testing.assert_close(hidden[n], whole.hidden[0, behind], rtol=1e-3, atol=5e-3)


def test_samples_of_the_cpu_build_are_refused(url: str, info: TargetInfo) -> None:
    """It verifies drafted tokens at a temperature that it has not set (0.32.0). If this fails, it has been mended."""
    client = FeatureServer(url, None, None, info, temperature=1.0)
    with pytest.raises(MismatchError, match="does not sample from the target"):
        client.check()
    client.close()


def test_states_with_another_norm_are_refused(url: str, info: TargetInfo, monkeypatch: Any) -> None:
    for wrong in (lambda hidden: hidden, lambda hidden: type(info).norm(info, type(info).norm(info, hidden))):
        client = FeatureServer(url, None, None, info)
        with monkeypatch.context() as patch:
            patch.setattr(info, "norm", wrong)
            with pytest.raises(MismatchError, match="nats away"):
                client.check()
        client.close()


def test_a_drafter_learns_the_same(
    client: FeatureServer, targets: dict[str, Target], info: TargetInfo, examples: list[Example], tmp_path: Path
) -> None:
    found = []
    for target, features in ((targets["float32"], None), (info, ServedFeatures(client, LAYERS))):
        dataset = DraftDataset(examples)
        torch.manual_seed(3)
        drafter = new_drafter(target, dataset.draft_vocabulary(target.vocab_size, 1024))
        options: dict[str, Any] = {"max_steps": STEPS, "logging_steps": 1, "per_device_train_batch_size": 2}
        options |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False, "use_cpu": True}
        config = VSDConfig(output_dir=str(tmp_path), objective="eagle3", draft_steps=2, **options)
        trainer = VSDTrainer(target, drafter, config, dataset, features=features)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    wanted, losses = found
    print(f"losses in process {wanted}, from vLLM {losses}")
    assert len(losses) == STEPS and losses == pytest.approx(wanted, rel=2e-3)


def test_answers_come_with_their_features(
    url: str, targets: dict[str, Target], info: TargetInfo, tmp_path: Path
) -> None:
    """Conversations of one and two turns, many at once; a second run asks nothing again."""
    found = [one for one in read_conversations(str(TEXT), need_answer=False)][:CHATS]
    turns = [[m for m in one.messages if m["role"] == "user"][:1] for one in found]
    chats = [Conversation(f"c{i}", f"f:{i + 1}", [*turn, *turn][: 1 + i % 2]) for i, turn in enumerate(turns)]
    out, kept = tmp_path / "out.jsonl", tmp_path / "kept"
    for _ in range(2):
        server = KeepingServer(url, "smollm2", None, info, kept)
        summary = regenerate(ServerTeacher(server, info, 6), chats, out, max_new_tokens=LENGTH, progress=False)
    assert summary.written == CHATS + CHATS // 2 == len(out.read_text().splitlines())
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert any(record["finish"] == "length" for record in records)
    answered = load_examples(out, info.tokenizer, 1024)
    assert len(list(kept.glob("*/*"))) == len({tuple(example.inputs.ids[:-1]) for example in answered})
    assert_same(KeptFeatures(TextStore(kept, info), info, answered, LAYERS), targets["float32"], answered)
