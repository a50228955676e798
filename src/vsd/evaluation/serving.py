"""An engine that serves the target with a drafter: its answers, and what it counts of their verification passes.

vLLM counts over all its requests, as Prometheus counters at /metrics:

    vllm:spec_decode_num_drafts                            verification passes
    vllm:spec_decode_num_accepted_tokens                   accepted drafted tokens
    vllm:spec_decode_num_accepted_tokens_per_pos           the same by drafted position, from 0
    vllm:request_success                                   finished requests

SGLang counts for every answer of its own API, /generate, in the answer's `meta_info`: `spec_verify_ct` passes, of which
`spec_correct_drafts_histogram`[j] accepted j drafted tokens (`spec_accept_histogram` in earlier versions). /server_info
has the length of its chains.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from vsd.data import Server
from vsd.errors import MismatchError, VSDError

_SAMPLE = re.compile(r"^([\w:]+?)(?:_total)?(?:\{(.*)\})? (\S+)", re.M)  # name, labels, value
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class ServedAnswer(NamedTuple):
    """An answer of the server.

    Attributes:
        tokens: of the answer; an end-of-turn token may be left out.
        passes: verification passes of the answer.
        accepted: of these, the numbers that accepted at least 1, 2, … drafted tokens.
    """

    tokens: list[int]
    passes: int
    accepted: list[int]


class Serving(Protocol):
    """An engine.

    Attributes:
        name: of the engine.
        depth: tokens that it drafts for a pass.
    """

    name: str
    depth: int

    def answer(self, ids: list[int], messages: list[Any], max_new_tokens: int) -> ServedAnswer:
        """The greedy answer to a prompt, while the server has no other request.

        Args:
            ids: the prompt's tokens.
            messages: the prompt as a chat, where it has images, which tokens do not hold; else none.
        """


def connect(server: Server) -> Serving:
    """The engine of a server.

    Raises:
        MismatchError: the server has other models, decodes without a drafter, drafts trees, or counts nothing.
        ConfigurationError, TargetError: no server answers there.
    """
    server.check()
    metrics = server.outside("/metrics", bytes.decode) or ""
    if "vllm:" in metrics:
        return _VLLM(server, metrics)
    info = server.outside("/server_info", _object) or server.outside("/get_server_info", _object)
    if info is not None and "speculative_algorithm" in info:
        return _SGLang(server, info)
    raise MismatchError(
        f"{server.url} counts no drafted tokens: vLLM does at /metrics, SGLang in /server_info and /generate"
    )


class _VLLM:
    name = "vLLM"

    def __init__(self, server: Server, metrics: str) -> None:
        self.server, self.last = server, _Counters.of(metrics)
        self.depth = len(self.last.accepted)
        if not self.depth:
            raise MismatchError(f"{server.url} decodes without a drafter: start vLLM with --speculative-config")

    def answer(self, ids: list[int], messages: list[Any], max_new_tokens: int) -> ServedAnswer:
        """See `Serving`."""
        reply = self.server.ask(messages, ids, max_tokens=max_new_tokens, temperature=0.0)
        if reply.ids is None:
            raise MismatchError(f"{self.server.url} gives no token ids of its answers: use vLLM 0.10.2 or later")
        if messages and reply.prompt_ids != ids:
            raise MismatchError(
                f"{self.server.url} makes other tokens of a chat with images: serve the target with its own chat "
                "template and image processor"
            )
        before, now = self.last, _Counters.of(self.server.outside("/metrics", bytes.decode) or "")
        self.last = now
        if now.requests - before.requests > 1:
            raise VSDError(
                f"{self.server.url} answered other requests meanwhile, and counts them too: "
                "compare while nothing else uses it"
            )
        accepted = [now.accepted[k] - count for k, count in before.accepted.items()]
        return ServedAnswer(reply.ids, now.passes - before.passes, accepted)


class _Counters(NamedTuple):
    """vLLM's counters: finished requests, passes, and accepted tokens by drafted position."""

    requests: int
    passes: int
    accepted: dict[int, int]

    @classmethod
    def of(cls, metrics: str) -> "_Counters":
        """The counters in Prometheus' text format, summed over vLLM's processes."""
        requests, passes, accepted = 0.0, 0.0, dict[int, float]()
        for name, labels, value in _samples(metrics):
            if name == "vllm:request_success":
                requests += value
            elif name == "vllm:spec_decode_num_drafts":
                passes += value
            elif name == "vllm:spec_decode_num_accepted_tokens_per_pos":
                position = int(labels["position"])
                accepted[position] = accepted.get(position, 0.0) + value
        return cls(int(requests), int(passes), {k: int(accepted[k]) for k in sorted(accepted)})


def _samples(metrics: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """(name without _total, labels, value) of every line."""
    for name, labels, value in _SAMPLE.findall(metrics):
        yield name, dict(_LABEL.findall(labels)), float(value)


class _SGLang:
    name = "SGLang"

    def __init__(self, server: Server, info: dict[str, Any]) -> None:
        self.server = server
        if not info["speculative_algorithm"]:
            raise MismatchError(f"{server.url} decodes without a drafter: start SGLang with --speculative-algorithm")
        if (info.get("speculative_eagle_topk") or 1) > 1:
            raise MismatchError(f"{server.url} drafts trees: start SGLang with --speculative-eagle-topk 1")
        self.depth = info.get("speculative_num_steps") or info["speculative_num_draft_tokens"] - 1

    def answer(self, ids: list[int], messages: list[Any], max_new_tokens: int) -> ServedAnswer:
        """See `Serving`."""
        if messages:
            raise MismatchError(f"{self.server.url}: prompts with images are compared with vLLM only: leave them out")
        sampling = {"temperature": 0.0, "max_new_tokens": max_new_tokens}
        found = self.server.outside("/generate", _generated, {"input_ids": ids, "sampling_params": sampling})
        if found is None:
            raise MismatchError(f"{self.server.url} has no /generate, in which SGLang counts accepted tokens")
        tokens, passes, histogram = found
        if passes and not histogram:
            raise MismatchError(f"{self.server.url} does not count accepted tokens by position: use a later SGLang")
        return ServedAnswer(tokens, passes, [sum(histogram[k:]) for k in range(1, self.depth + 1)])


def _generated(response: bytes) -> tuple[list[int], int, list[int]]:
    """(tokens, passes, passes by number of accepted tokens) of a response of /generate."""
    answer = _object(response)
    info = answer["meta_info"]
    histogram = info.get("spec_correct_drafts_histogram") or info.get("spec_accept_histogram") or []
    return list(answer["output_ids"]), int(info.get("spec_verify_ct") or 0), histogram


def _object(response: bytes) -> dict[str, Any]:
    value = json.loads(response)
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return value
