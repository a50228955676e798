"""vLLM answers training prompts over HTTP, is killed in the middle and started again: nothing lost, nothing doubled."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from setting import ENVIRONMENT
from vsd.data import Conversation, Server, ServerTeacher, Summary, load_examples, prompt_inputs, regenerate
from vsd.targets import TargetInfo, load_target_info

Start = Callable[[], subprocess.Popen[bytes]]
CHATS, LENGTH = 40, 24
TOPICS = ["rivers", "bread", "the moon", "trains", "chess"]


@pytest.fixture(scope="module")
def info() -> TargetInfo:
    return load_target_info("smollm2-135m")


@pytest.fixture
def vllm(vllm_bin: Path, target_folder: str, tmp_path: Path) -> Iterator[tuple[str, Start]]:
    """An address, and what starts a server there; what still runs in the end is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(vllm_bin / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", target_folder]
    command += ["--served-model-name", "smollm2", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        environment = {**os.environ, **ENVIRONMENT}
        with (tmp_path / f"server{len(started)}.log").open("wb") as log:
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        started.append(server)
        return server

    yield f"http://127.0.0.1:{port}", start
    for server in started:
        kill(server)


def kill(server: subprocess.Popen[bytes]) -> None:
    """The server and the engine it started: a session of their own."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def is_up(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def chats() -> list[Conversation]:
    """Conversations of one and two turns."""
    found = []
    for i in range(CHATS):
        asked = [f"Tell me {i + 2} facts about {TOPICS[(i + turn) % 5]}." for turn in range(i % 2 + 1)]
        found.append(Conversation(f"c{i}", f"f:{i + 1}", [{"role": "user", "content": text} for text in asked]))
    return found


def test_killed_in_the_middle_and_started_again(vllm: tuple[str, Start], info: TargetInfo, tmp_path: Path) -> None:
    out, done = tmp_path / "out.jsonl", list[Summary]()
    url, start = vllm
    server = start()
    wait_for(lambda: is_up(url), 300)

    def ask() -> None:
        done.append(
            regenerate(
                ServerTeacher(Server(url, "smollm2"), info, 4), chats(), out, max_new_tokens=LENGTH, progress=False
            )
        )

    client = threading.Thread(target=ask, daemon=True)
    client.start()
    lines = lambda: out.read_bytes().count(b"\n") if out.exists() else 0  # noqa: E731
    wait_for(lambda: lines() >= 8, 120)
    kill(server)
    before = lines()
    assert before < CHATS
    start()
    client.join(timeout=400)
    assert not client.is_alive() and done[0].written == CHATS + CHATS // 2

    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({record["id"] for record in found}) == len(found) == CHATS + CHATS // 2
    assert {f"c{i}/{t}" for i in range(CHATS) for t in range(i % 2 + 1)} == {record["id"] for record in found}
    for record in found:  # the server's own tokens
        assert record["prompt_ids"] == prompt_inputs(info.tokenizer, record["messages"][:-1]).ids
        ended = record["response_ids"][-1] in info.eos_ids
        assert ended == (record["finish"] == "stop")
        assert len(record["response_ids"]) == LENGTH or ended
    assert len(load_examples(out, info.tokenizer, 1024)) == len(found)

    again = regenerate(  # nothing is asked twice
        ServerTeacher(Server(url, "smollm2"), info), chats(), out, max_new_tokens=LENGTH, progress=False
    )
    assert again == done[0] and lines() == len(found)
