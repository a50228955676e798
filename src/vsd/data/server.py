"""A client of servers with OpenAI's API (vLLM, SGLang, llama.cpp, …) that retries for as long as a batch job needs.

Messages go to `/v1/chat/completions`, prompts of token ids to `/v1/completions`. Temporary failures (status 408, 425,
429 or 5xx, a lost connection, a malformed response) are retried after the pause that Retry-After gives, or a pause that
doubles from half a second to thirty. A request that has failed for ten minutes raises; a permanent failure (no such
model, no permission) raises at once. Token ids are requested with vLLM's `return_token_ids`.
"""

import http.client
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from vsd.data.lines import LOG, BadLineError
from vsd.data.messages import REASONING
from vsd.errors import ConfigurationError, MismatchError, TargetError

T = TypeVar("T")
_RETRY_SECONDS = 600.0  # a request that keeps failing raises after this time
_FIRST_RETRY_SECONDS = 5.0  # the same for the first request, which finds out whether the address is right
_WARNING_SECONDS = 60.0  # between two warnings
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts
_TIMEOUT = 600.0  # seconds for one response
_IDLE = 3.0  # seconds after which a connection is not used again: servers close idle ones
_REFUSED = (400, 413, 422)  # status of a request that the server refuses for its content
_TEMPORARY = (408, 425, 429)  # status, besides 5xx, of a request that may succeed later
_UNSENDABLE = re.compile(r"[\x00-\x20\x7f]")  # characters that addresses and keys cannot have


class Reply(NamedTuple):
    """A server's answer.

    Attributes:
        finish: "stop" if the model ended its answer, "length" if the limit cut it.
        prompt_ids, ids: tokens of the prompt and of the answer, if the server gives them.
        log_probs: of the answer's tokens, if they were asked for.
        transfer: what a KV connector of the server says about the request.
    """

    text: str
    finish: Literal["stop", "length"]
    prompt_ids: list[int] | None
    ids: list[int] | None
    log_probs: list[float] | None = None
    transfer: dict[str, Any] | None = None


class _NoSuchPathError(ConfigurationError):
    """The server has nothing at a path."""


class ServerDownError(TargetError):
    """A request has failed as long as it is retried: what failed, and the pause that the server asks for."""

    def __init__(self, url: str, failure: str, retry_after: float | None) -> None:
        super().__init__(f"{url} fails: {failure}; run the same command again when the server is up")
        self.failure, self.retry_after = failure, retry_after


class Server:
    """One model at one address; threads may share it.

    Args:
        url: `http://host:8000`, with or without `/v1`. An API key is read from `$OPENAI_API_KEY`.
        model: the name under which it is served.
        requests_per_second: the most requests in a second; None: no limit.

    Attributes:
        retries: whether a request that fails is repeated; else ServerDownError is raised at once.

    Raises:
        ConfigurationError: no URL, a key that no header can hold, or a rate that is not positive.
    """

    def __init__(self, url: str, model: str, requests_per_second: float | None = None) -> None:
        self.url, self.model, self.retries = url, model, True
        self._secure, self._host, self._port, self._root = _address(url)
        self._headers = {"Content-Type": "application/json", **_authorization()}
        self._pace = Pace(requests_per_second)
        self._thread = threading.local()  # holds each thread's connection
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = threading.Event()
        self._gives_ids = True  # until the server refuses `return_token_ids`
        self._warned = -_WARNING_SECONDS

    def check(self) -> None:
        """Request the names of the served models.

        Raises:
            MismatchError: the server has other models.
            ConfigurationError, TargetError: as in `ask`.
        """
        served = self.models()
        if self.model not in served:
            raise MismatchError(f"{self.url} does not serve '{self.model}': it has {', '.join(served) or 'no model'}")

    def models(self) -> list[str]:
        """Names of the served models. Raises: as `check`."""
        return self._call("GET", "/models", None, _model_names, _FIRST_RETRY_SECONDS)

    def ask(self, messages: list[dict[str, str]], ids: list[int], **sampling: Any) -> Reply:
        """The answer to `messages`, or to the prompt `ids` if `messages` is empty.

        Args:
            sampling: `max_tokens`, `temperature`, `seed` and other fields of the request.

        Raises:
            BadLineError: the server refuses this conversation.
            ConfigurationError: the server refuses every request (a wrong key or path), or gives answers as text without
                their reasoning.
            TargetError: the request has failed for ten minutes.
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

    def outside(self, path: str, read: Callable[[bytes], T], body: Any = None) -> T | None:
        """What the server has at a path outside OpenAI's API, such as /metrics; None if it has no such path.

        Args:
            read: parses the response; a ValueError, KeyError, TypeError or IndexError is a malformed one.
            body: what is posted as JSON; None: the path is only read.

        Raises:
            ConfigurationError, TargetError: as in `ask`.
        """
        method, retry_seconds = ("GET", _FIRST_RETRY_SECONDS) if body is None else ("POST", None)
        try:
            return self._call(method, path, body, read, retry_seconds, api=False)
        except _NoSuchPathError:
            return None

    def interrupt(self) -> None:
        """Send no more requests; threads that wait for a response stop waiting."""
        self._closed.set()
        for connection in list(self._open):
            _shut_down(connection)

    def close(self) -> None:
        """Close all connections. No thread may use them any more."""
        for connection in self._open:
            connection.close()
        self._open.clear()

    def _call(
        self,
        method: str,
        path: str,
        body: Any,
        read: Callable[[Any], T],
        retry_seconds: float | None = None,
        *,
        api: bool = True,
    ) -> T:
        """The response's JSON as parsed by `read`, after as many attempts as it takes.

        Outside OpenAI's API (`api` False), `read` parses the response's bytes.
        """
        patience = Patience(retry_seconds)
        while True:
            self._pace.wait(self._closed)
            if self._closed.is_set():
                raise TargetError("interrupted")
            retry_after: float | None = None
            try:
                status, headers, text = self._send(method, path, body, api)
                if status == 200:
                    return read(json.loads(text) if api else text)
                self._raise_if_permanent(status, path, text)
                failure, retry_after = f"status {status}: {_excerpt(text)}", _retry_after(headers)
            except (OSError, http.client.HTTPException) as error:
                self._drop_connection()
                failure = " ".join(str(error).split()) or type(error).__name__
            except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
                failure = f"not a response of OpenAI's API ({type(error).__name__}: {error})"
            pause = patience.pause(retry_after)
            if pause is not None:
                self._warn(failure)
            if pause is None or not self.retries:
                raise ServerDownError(self.url, failure, retry_after)
            self._closed.wait(pause)

    def _send(self, method: str, path: str, body: Any, api: bool) -> tuple[int, Message, bytes]:
        root = self._root if api else self._root.removesuffix("/v1")
        connection = self._connection()
        connection.request(method, root + path, None if body is None else json.dumps(body), self._headers)
        late = threading.Timer(_TIMEOUT, _shut_down, [connection])  # a response that drips meets no socket's timeout
        late.daemon = True
        late.start()
        try:
            response = connection.getresponse()
            content = response.read()
        finally:
            late.cancel()
        self._thread.used = time.monotonic()
        return response.status, response.headers, content

    def _warn(self, failure: str) -> None:
        """Log a warning that the request is retried, at most one a minute."""
        if time.monotonic() - self._warned > _WARNING_SECONDS and not self._closed.is_set():
            self._warned = time.monotonic()
            LOG.warning("%s: %s; trying again", self.url, failure)

    def _raise_if_permanent(self, status: int, path: str, text: bytes) -> None:
        """Raise for a status that another attempt will not change."""
        if status in _REFUSED:
            raise BadLineError(f"the server refuses it: {_excerpt(text)}")
        if status not in _TEMPORARY and status < 500:
            hint = " (is $OPENAI_API_KEY right?)" if status in (401, 403) else ""
            kind = _NoSuchPathError if status in (404, 405) else ConfigurationError
            raise kind(f"{self.url} answers {path} with status {status}{hint}: {_excerpt(text)}")

    def _connection(self) -> http.client.HTTPConnection:
        found: http.client.HTTPConnection | None = getattr(self._thread, "connection", None)
        if found is not None and time.monotonic() - self._thread.used > _IDLE:
            self._drop_connection()
            found = None
        if found is None:
            make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
            found = self._thread.connection = make(self._host, self._port, timeout=_TIMEOUT)
            self._thread.used = time.monotonic()
            self._open.add(found)
        return found

    def _drop_connection(self) -> None:
        """Close this thread's connection, if it has one; the next request opens another."""
        connection: http.client.HTTPConnection | None = getattr(self._thread, "connection", None)
        if connection is not None:
            connection.close()
            self._open.discard(connection)
            self._thread.connection = None


def _address(url: str) -> tuple[bool, str, int | None, str]:
    """Whether the address is https, its host, its port, and the path of the API's root."""
    try:
        parts = urlsplit(url)
        host, root = parts.hostname, parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        if parts.scheme in ("http", "https") and host and not _UNSENDABLE.search(host + root):
            host.encode("idna")
            root.encode("ascii")
            return parts.scheme == "https", host, parts.port, root
    except ValueError:  # a port that is not a number, or characters that host or path cannot have
        pass
    raise ConfigurationError(f"'{url}' is no server's address: give one like http://localhost:8000")


def _authorization() -> dict[str, str]:
    """The header with the API key, if there is a key."""
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        return {}
    if not key.isascii() or _UNSENDABLE.search(key):
        raise ConfigurationError("$OPENAI_API_KEY has a space, a line break or another character that no key has")
    return {"Authorization": f"Bearer {key}"}


def _shut_down(connection: http.client.HTTPConnection) -> None:
    """End what a thread waits for."""
    if connection.sock is not None:
        with suppress(OSError):  # closed already
            connection.sock.shutdown(socket.SHUT_RDWR)


class Patience:
    """Pauses between attempts, from half a second to thirty, each twice the last, until ten minutes have passed.

    Args:
        seconds: instead of the ten minutes.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._next = _FIRST_PAUSE
        self._end = time.monotonic() + (_RETRY_SECONDS if seconds is None else seconds)

    def pause(self, retry_after: float | None = None) -> float | None:
        """Seconds until the next attempt, `retry_after` if it is given; None: there is none."""
        wait = self._next * random.uniform(0.75, 1.25) if retry_after is None else retry_after
        self._next = min(2 * self._next, _LONGEST_PAUSE)
        return None if time.monotonic() + wait > self._end else wait


class Pace:
    """Spaces the requests of all threads evenly, so many a second.

    Raises:
        ConfigurationError: a rate that is not positive.
    """

    def __init__(self, per_second: float | None) -> None:
        if per_second is not None and per_second <= 0:
            raise ConfigurationError(f"requests per second must be positive, not {per_second}")
        self.gap = 1 / per_second if per_second else 0.0
        self.next, self.lock = 0.0, threading.Lock()

    def wait(self, closed: threading.Event) -> None:
        """Wait for this thread's turn, or until `closed` is set."""
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.next)
            self.next = turn + self.gap
        if turn > now:
            closed.wait(turn - now)


def _reply(answer: dict[str, Any]) -> Reply:
    """The reply in a response.

    Raises:
        ConfigurationError: its text lacks the reasoning, and there are no token ids.
    """
    choice = answer["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if text is not None and not isinstance(text, str):
        raise TypeError("the content is not text")
    # `prompt_token_ids` is in the answer of a chat, in the choice of a completion
    prompt = answer.get("prompt_token_ids") or choice.get("prompt_token_ids")
    finish: Literal["stop", "length"] = "length" if choice.get("finish_reason") == "length" else "stop"
    ids, log_probs = _token_ids(choice.get("token_ids")), dict(choice.get("logprobs") or {}).get("token_logprobs")
    if ids is None and any(choice.get("message", {}).get(key) for key in REASONING):
        raise ConfigurationError(
            "the server separates reasoning from answers and gives no token ids: switch its reasoning parser off"
        )
    return Reply(text or "", finish, _token_ids(prompt), ids, log_probs, answer.get("kv_transfer_params"))


def _token_ids(value: Any) -> list[int] | None:
    """Token ids, if the server gives them.

    Raises:
        TypeError: they are something else.
    """
    if value is not None and not (isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)):
        raise TypeError("token ids are not a list of integers")
    return value or None


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
    """The error message of a response, or the response's beginning, on one line."""
    message: Any = text.decode(errors="replace")
    try:
        found = json.loads(text)
        message = found.get("message") or found["error"]
        message = message["message"] if isinstance(message, dict) else message
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return " ".join(str(message).split())[:300] or "no message"
