"""A client of servers that speak OpenAI's API (vLLM, SGLang, llama.cpp, …), as stubborn as a long job needs.

Messages go to `/v1/chat/completions`, prompts that are tokens to `/v1/completions`. What may pass (429, 5xx, a lost
connection, a garbled answer) is asked again after a pause that doubles up to half a minute, or is as long as
Retry-After says, until nothing has come for ten minutes; what will not pass (no such model, no permission) is raised.
Token ids are asked for as vLLM gives them, `return_token_ids`.
"""

import http.client
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from vsd.data.chat import LOG, BadLineError
from vsd.errors import VSDError

T = TypeVar("T")
_PATIENCE = 600.0  # seconds of nothing but failures for one question
_PATIENCE_AT_FIRST = 5.0  # a wrong address is told soon
_QUIET = 60.0  # seconds between two warnings
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_TIMEOUT = 600.0  # for one answer
_REFUSED_LINE = (400, 413, 422)  # the server's word for a conversation it will not take


class Reply(NamedTuple):
    """A server's answer: its text, "stop" or "length", and the tokens of prompt and answer where it gives them."""

    text: str
    finish: Literal["stop", "length"]
    prompt_ids: list[int] | None
    ids: list[int] | None


class Server:
    """One model behind one address; any number of threads may ask.

    Args:
        url: `http://host:8000`, with or without `/v1`; the key, if one is needed, is in `$OPENAI_API_KEY`.
        model: the name it is served by.
        requests_per_second: never ask more often.

    Raises:
        VSDError: no URL, or a rate that is not positive.
    """

    def __init__(self, url: str, model: str, requests_per_second: float | None = None) -> None:
        if requests_per_second is not None and requests_per_second <= 0:
            raise VSDError("requests per second must be positive")
        self.url, self.model = url, model
        self._secure, self._host, self._port, self._root = _address(url)
        self._pace = _Pace(requests_per_second)
        self._mine = threading.local()  # each thread's connection
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = threading.Event()
        self._gives_ids = True  # until it says no
        self._warned = -_QUIET

    def check(self) -> None:
        """Ask which models it serves.

        Raises:
            VSDError: it does not answer, or serves others.
        """
        served = self._call("GET", "/models", None, _model_names, _PATIENCE_AT_FIRST)
        if self.model not in served:
            raise VSDError(f"{self.url} does not serve '{self.model}': it has {', '.join(served) or 'no model'}")

    def ask(self, messages: list[dict[str, str]], ids: list[int], **sampling: Any) -> Reply:
        """Answer `messages`, or the tokens `ids` where there are none.

        Args:
            sampling: `max_tokens`, `temperature`, `seed`.

        Raises:
            BadLineError: the server refuses this conversation.
            VSDError: it refuses us, or has been silent too long.
        """
        path, prompt = ("/chat/completions", {"messages": messages}) if messages else ("/completions", {"prompt": ids})
        body: dict[str, Any] = {"model": self.model, **prompt, **sampling}
        if self._gives_ids:
            try:
                return self._call("POST", path, {**body, "return_token_ids": True}, _reply)
            except BadLineError as error:
                if "return_token_ids" not in str(error):
                    raise
                self._gives_ids = False
        return self._call("POST", path, body, _reply)

    def interrupt(self) -> None:
        """Ask no more; threads that wait for an answer stop waiting."""
        self._closed.set()
        for connection in list(self._open):
            if connection.sock is not None:
                with suppress(OSError):  # closed already
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all connections, when no thread uses them any more."""
        for connection in self._open:
            connection.close()
        self._open.clear()

    def _call(self, method: str, path: str, body: Any, read: Callable[[Any], T], patience: float | None = None) -> T:
        """What `read` makes of the JSON that comes back, however often it must be asked for."""
        pause, deadline = _FIRST_PAUSE, time.monotonic() + (_PATIENCE if patience is None else patience)
        while True:
            self._pace.wait(self._closed)
            if self._closed.is_set():
                raise VSDError("interrupted")
            asked_for: float | None = None
            try:
                status, headers, text = self._send(method, path, body)
                if status == 200:
                    return read(json.loads(text))
                self._raise_if_final(status, path, text)
                trouble, asked_for = f"status {status}: {_excerpt(text)}", _retry_after(headers)
            except (OSError, http.client.HTTPException) as error:
                self._hang_up()
                trouble = str(error) or type(error).__name__
            except (ValueError, KeyError, TypeError, IndexError) as error:
                trouble = f"not an answer of OpenAI's API ({type(error).__name__}: {error})"
            wait = pause * random.uniform(0.75, 1.25) if asked_for is None else asked_for
            if time.monotonic() + wait > deadline:
                raise VSDError(f"{self.url} fails: {trouble}; run the same command again when it is up")
            self._warn(trouble)
            self._closed.wait(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _send(self, method: str, path: str, body: Any) -> tuple[int, Message, bytes]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        connection = self._connection()
        connection.request(method, self._root + path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()

    def _warn(self, trouble: str) -> None:
        """Say that it is being asked again, now and then."""
        if time.monotonic() - self._warned > _QUIET and not self._closed.is_set():
            self._warned = time.monotonic()
            LOG.warning("%s: %s; asking again", self.url, trouble)

    def _raise_if_final(self, status: int, path: str, text: bytes) -> None:
        """What asking again will not change."""
        if status in _REFUSED_LINE:
            raise BadLineError(f"the server refuses it: {_excerpt(text)}")
        if status not in (408, 425, 429) and status < 500:
            hint = " (is $OPENAI_API_KEY right?)" if status in (401, 403) else ""
            raise VSDError(f"{self.url} answers {path} with status {status}{hint}: {_excerpt(text)}")

    def _connection(self) -> http.client.HTTPConnection:
        found: http.client.HTTPConnection | None = getattr(self._mine, "connection", None)
        if found is None:
            make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
            found = self._mine.connection = make(self._host, self._port, timeout=_TIMEOUT)
            self._open.add(found)
        return found

    def _hang_up(self) -> None:
        """Forget this thread's connection; the next request opens another."""
        connection = self._connection()
        connection.close()
        self._open.discard(connection)
        self._mine.connection = None


def _address(url: str) -> tuple[bool, str, int | None, str]:
    """Whether it is https, host, port, and the path of the API's root."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return (
                parts.scheme == "https",
                parts.hostname,
                parts.port,
                parts.path.rstrip("/").removesuffix("/v1") + "/v1",
            )
    except ValueError:  # a port that is no number
        pass
    raise VSDError(f"'{url}' is no server's address: give one like http://localhost:8000")


class _Pace:
    """Lets through so many a second, evenly, whatever the number of threads."""

    def __init__(self, per_second: float | None) -> None:
        self.gap = 1 / per_second if per_second else 0.0
        self.next, self.lock = 0.0, threading.Lock()

    def wait(self, closed: threading.Event) -> None:
        """Until it is this caller's turn."""
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.next)
            self.next = turn + self.gap
        if turn > now:
            closed.wait(turn - now)


def _reply(answer: dict[str, Any]) -> Reply:
    choice = answer["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if text is not None and not isinstance(text, str):
        raise TypeError("content is no text")
    # a chat's prompt stands in the answer, a completion's in the choice
    prompt = answer.get("prompt_token_ids") or choice.get("prompt_token_ids")
    finish: Literal["stop", "length"] = "length" if choice.get("finish_reason") == "length" else "stop"
    return Reply(text or "", finish, prompt or None, choice.get("token_ids") or None)


def _retry_after(headers: Message) -> float | None:
    """Seconds that Retry-After asks for, in either of its forms."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _model_names(answer: dict[str, Any]) -> list[str]:
    return [str(entry["id"]) for entry in answer["data"]]


def _excerpt(text: bytes) -> str:
    """The server's own message, or the beginning of what it sent, on one line."""
    said: Any = text.decode(errors="replace")
    try:
        found = json.loads(text)
        said = found.get("message") or found["error"]
        said = said["message"] if isinstance(said, dict) else said
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return " ".join(str(said).split())[:300] or "no message"
