"""Servers that answer wrongly: once, and nothing is lost; for ever, and the command ends with what to do."""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from case import Case, Outcome, Rule, Workshop, refused
from fake_server import FakeServer, Handler
from vsd.data import server as client

Fault = Callable[[Handler], None]
SHORT: dict[str, Any] = {
    "_FIRST_PAUSE": 0.01,
    "_LONGEST_PAUSE": 0.05,
    "_RETRY_SECONDS": 0.6,
    "_FIRST_RETRY_SECONDS": 0.2,
    "_TIMEOUT": 0.3,
}


def raw(content: bytes, status: int = 200, **headers: str) -> Fault:
    """These bytes; the connection ends with them."""

    def fault(handler: Handler) -> None:
        handler.raw(status, content, **headers)
        handler.close_connection = True

    return fault


def choice(**fields: Any) -> Fault:
    """A response with one answer of these fields."""
    found = {"message": {"content": "hello"}, "finish_reason": "stop", **fields}
    return raw(json.dumps({"choices": [found]}).encode())


def silent(handler: Handler) -> None:
    """No answer, for longer than the client waits."""
    time.sleep(1.0)


def slow(handler: Handler) -> None:
    """A response that drips, and would end after the client's patience."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n")
    with contextlib.suppress(OSError):
        for _ in range(12):
            handler.wfile.write(b" ")
            time.sleep(0.1)
    handler.close_connection = True


def no_http(handler: Handler) -> None:
    handler.wfile.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    handler.close_connection = True


TEMPORARY: dict[str, Fault] = {
    "half a JSON": raw(b'{"choices": ['),
    "no JSON": raw(b"<html>busy</html>"),
    "nothing": raw(b""),
    "a cut response": raw(b'{"choices": [', Content_Length="500"),
    "deep JSON": raw(b"[" * 100_000),
    "a list": raw(b"[]"),
    "NaN": raw(b"NaN"),
    "no choices": raw(b'{"choices": []}'),
    "choices of another kind": raw(b'{"choices": {"a": 1}}'),
    "text of another kind": choice(message={"content": 7}),
    "ids of another kind": choice(token_ids="abc"),
    "ids that are no integers": choice(token_ids=[1.5, None]),
    "ids that are NaN": choice(token_ids=[float("nan")]),
    "negative ids": choice(token_ids=[-1, 2]),
    "prompt ids of another kind": choice(token_ids=[20, 2], prompt_token_ids=["a"]),
    "an error": raw(b'{"error": "out of luck"}', 500),
    "too many requests": raw(b"{}", 429, Retry_After="0.01"),
    "silence": silent,
    "drops": slow,
    "not HTTP": no_http,
    "not UTF-8": raw(b'{"choices": "\xff"}'),
}
PERMANENT: dict[str, Fault] = {
    "ids of another target": choice(token_ids=[5000, 2]),
    "ids that do not spell the text": choice(token_ids=[20, 21, 2]),
    "more tokens than allowed": choice(message={"content": "h" * 90}, token_ids=[15 + 18] * 90),
    "the prompt of another question": choice(token_ids=None, prompt_token_ids=[20, 21, 22]),
    "no such model": raw(b'{"error": {"message": "no such model"}}', 404),
    "no permission": raw(b"{}", 401),
    "elsewhere": raw(b"", 302, Location="http://127.0.0.1:9/"),
}


@contextlib.contextmanager
def serving(words: list[str], faults: list[Fault], ever: Fault | None) -> Iterator[None]:
    """A server with these faults, then for ever with the last one; its address goes into the command."""
    server = FakeServer(*faults)
    if ever is not None:
        server.faults = Endless(ever)
    words += ["--server", server.url]
    try:
        with mock.patch.multiple(client, **SHORT):
            yield
    finally:
        server.shutdown()
        server.server_close()


class Endless(list[Fault]):
    """A list of faults that never ends."""

    def __init__(self, fault: Fault) -> None:
        super().__init__([fault])

    def pop(self, *_: Any) -> Fault:
        return self[0]


def asking(shop: Workshop, out: Path) -> list[str]:
    """`vsd data regenerate` of four turns by a server, which `serving` names."""
    words = ["data", "regenerate", str(shop / "prompts.jsonl"), "--out", str(out), *shop.named, "--model", "tiny"]
    return [*words, "--max-new-tokens", "40"]


def once(fault: Fault) -> Rule:
    """A fault or several, then answers: all are there, none twice."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        out = folder / "out.jsonl"
        words, faults = asking(shop, out), [fault] * random.randint(1, 3)

        def wrong(found: Outcome) -> str:
            if found.code != 0:
                return f"status {found.code}: {found.err}"
            ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
            return "" if len(ids) == 4 == len(set(ids)) else f"answers: {ids}"

        return Case(words, wrong, lambda: serving(words, faults, None))

    return rule


def for_ever(fault: Fault) -> Rule:
    """The server is named, and what is to do."""

    def rule(shop: Workshop, folder: Path, random: Random) -> Case:
        words = asking(shop, folder / "out.jsonl")
        names = r"127\.0\.0\.1:\d+ (fails: .*run the same command again|answers)|server's"
        return Case(words, refused(names), lambda: serving(words, [], fault))

    return rule


def address(shop: Workshop, folder: Path, random: Random) -> Case:
    """No server's address."""
    url = random.choice(["localhost:8000", "ftp://host", "http://", "http://host:port", "", "http://[::1", "http:// x"])
    words = [*asking(shop, folder / "out.jsonl"), "--server", url]
    return Case(
        words, refused(rf"{re.escape(url)}.*(server's address|fails)"), lambda: mock.patch.multiple(client, **SHORT)
    )


RULES: dict[str, Rule] = {
    **{f"server once: {name}": once(fault) for name, fault in TEMPORARY.items()},
    **{f"server for ever: {name}": for_ever(fault) for name, fault in {**TEMPORARY, **PERMANENT}.items()},
    "server: address": address,
}
