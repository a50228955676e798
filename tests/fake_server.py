"""A server with OpenAI's API for the tiny target; it fails on demand."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from transformers import LlamaConfig

from tiny import tiny_tokenizer
from vsd.data import prompt_inputs
from vsd.targets.info import TargetInfo

CONFIG = LlamaConfig(vocab_size=128, hidden_size=32, max_position_embeddings=512)
INFO = TargetInfo("tiny", tiny_tokenizer(), CONFIG, (2,), lambda: pytest.fail("a weight was read"))
END = 2


class FakeServer(ThreadingHTTPServer):
    """Answers "answer to " and the question. The first requests meet `faults`, one each."""

    daemon_threads = True
    models = ("tiny", "other")

    def __init__(self, *faults: Callable[["Handler"], None], gives_ids: bool = True, delay: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.gives_ids, self.delay = list(faults), gives_ids, delay
        self.lock = threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.now = self.most = 0  # requests in progress, and the largest number of them
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def completion(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return completion(path, body)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that disconnect are expected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def do_GET(self) -> None:
        self.json(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        self.body = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.times.append(time.monotonic())
            fault = server.faults.pop(0) if server.faults else None
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            time.sleep(server.delay)
            if fault is not None:
                return fault(self)
            if "return_token_ids" in body and not server.gives_ids:
                return self.json(400, {"error": {"message": "Unrecognized request argument: return_token_ids"}})
            with server.lock:
                server.asked.append(body)
                server.keys.append(self.headers.get("Authorization"))
            self.json(200, server.completion(self.path, body))
        finally:
            with server.lock:
                server.now -= 1

    def json(self, status: int, value: Any, **headers: str) -> None:
        self.raw(status, json.dumps(value).encode(), **headers)

    def raw(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


def completion(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The response with token ids, where they are requested: an answer of at most `max_tokens` tokens."""
    tokenizer = INFO.tokenizer
    chat = path == "/v1/chat/completions"
    prompt = prompt_inputs(tokenizer, body["messages"]).ids if chat else body["prompt"]
    text = f"answer to {body['messages'][-1]['content'] if chat else len(prompt)}"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], END][: body["max_tokens"]]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    choice = {"finish_reason": "stop" if ids[-1] == END else "length"}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    if not body.get("return_token_ids"):
        return {"choices": [choice]}
    if chat:
        return {"choices": [{**choice, "token_ids": ids}], "prompt_token_ids": prompt}
    return {"choices": [{**choice, "token_ids": ids, "prompt_token_ids": prompt}]}
