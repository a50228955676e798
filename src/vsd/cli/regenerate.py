"""`vsd data regenerate`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from vsd.cli.parser import Command, Given
from vsd.cli.shared import check_server, load, load_info, report_skipped
from vsd.errors import ConfigurationError
from vsd.options import TargetOptions

if TYPE_CHECKING:
    from vsd.data import Server, Servers, ServerTeacher, Summary
    from vsd.targets import TargetInfo

S = TypeVar("S", bound="Server")

EXAMPLES = """\
  vsd data regenerate prompts.jsonl --target T --out text.jsonl --max-new-tokens 512
  vsd data regenerate prompts.jsonl --target T --out text.jsonl --server http://localhost:8000 --model NAME
  vsd data regenerate prompts.jsonl --target T --out text.jsonl --server URL --model NAME --features features/

With --server, a running vLLM, SGLang or other OpenAI-compatible server answers (key: $OPENAI_API_KEY); of the target
only the tokenizer is loaded. Several share the work: --server URL --server URL. With --features, vLLM started as vsd
data server says also gives the target's features. After an interruption, run the same command again: it continues."""


@dataclass
class Regenerate:
    """conversations and answers

    Attributes:
        source: JSONL, .json, .txt, Parquet or Arrow file, a folder of such files, or a hub dataset (hf:NAME:SPLIT)
        out: JSONL file to write; an existing one is continued
        limit: use only this many conversations
        batch_size: answers that are generated together
        max_length: longest prompt and answer together, in tokens
        max_new_tokens: longest answer in tokens
        temperature: sampling temperature; 0 is greedy
        seed: seed of sampling
        on_bad_line: unusable line: stop (fatal), or report the line and continue (skip)
    """

    source: str = field(metadata={"positional": True})
    out: Path
    limit: int | None = None
    batch_size: int = 64
    max_length: int = 2048
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    on_bad_line: Literal["fatal", "skip"] = "fatal"


@dataclass
class ServerOptions:
    """server

    Attributes:
        server: URL of a server that answers instead, such as http://localhost:8000; again for each further server
        model: name under which the servers have the target
        concurrency: requests in flight, to all servers together
        requests_per_second: highest rate of requests, to all servers together
        features: folder that keeps the target's features of all answers in OUT, for vsd train --features
    """

    server: list[str] = field(default_factory=list, metadata={"metavar": "URL", "single": True})
    model: str | None = field(default=None, metadata={"metavar": "NAME"})
    concurrency: int = 32
    requests_per_second: float | None = None
    features: Path | None = None


def run(given: Given) -> None:
    """Replace answers by the target's own."""
    from itertools import chain, islice

    from vsd.data import TargetTeacher, Teacher, read_conversations, regenerate

    a, by, target = given.of(Regenerate), given.of(ServerOptions), given.of(TargetOptions)
    check_server(by.server, by.model)
    if by.features is not None and not by.server:
        raise ConfigurationError("features of answers come from a server (--server URL); vsd train makes its own store")
    conversations = read_conversations(a.source, on_bad_line=a.on_bad_line, report=report_skipped, need_answer=False)
    first = next(conversations)  # a missing or unreadable source is known before the target is loaded
    teacher: Teacher = _by_servers(a, by, load_info(target)) if by.server else TargetTeacher(load(target), a.batch_size)
    summary = regenerate(
        teacher,
        islice(chain([first], conversations), a.limit),
        a.out,
        max_new_tokens=a.max_new_tokens,
        temperature=a.temperature,
        seed=a.seed,
        max_length=a.max_length,
        on_bad_line=a.on_bad_line,
        report=report_skipped,
        count=lambda: _count(a),
    )
    if by.features is not None:
        _add_missing(a, by, by.features, teacher.info)
    print(f"{a.out}: {summary.written} answers{_cut(a, summary)}, {summary.tokens} tokens, {summary.skipped} skipped")


def _cut(a: Regenerate, summary: "Summary") -> str:
    """How many answers are cut, and the remedy; nothing if none is."""
    if not summary.cut:
        return ""
    remedy = "for whole answers give more, with a larger --max-length if needed, and another --out"
    return f" ({summary.cut} cut at --max-new-tokens {a.max_new_tokens}: {remedy})"


def _count(a: Regenerate) -> int | None:
    """The number of conversations, if it is known."""
    from vsd.data import count_rows

    return min((n for n in (count_rows(a.source), a.limit) if n is not None), default=None)


def _by_servers(a: Regenerate, by: ServerOptions, info: "TargetInfo") -> "ServerTeacher":
    from vsd.data import Server, ServerTeacher
    from vsd.features import KeepingServer

    model, folder = by.model or "", by.features
    if folder is None:
        return ServerTeacher(_joined(by, lambda url, rate: Server(url, model, rate)), info, by.concurrency)
    keeping = _joined(by, lambda url, rate: KeepingServer(url, model, rate, info, folder, a.temperature))
    return ServerTeacher(keeping, info, by.concurrency)


def _joined(by: ServerOptions, connect: "Callable[[str, float | None], S]") -> "S | Servers[S]":
    """The server, or several as one. The rate is that of all requests."""
    from vsd.data import Servers

    if len(by.server) == 1:
        return connect(by.server[0], by.requests_per_second)
    return Servers([connect(url, None) for url in by.server], by.requests_per_second)


def _add_missing(a: Regenerate, by: ServerOptions, folder: Path, info: "TargetInfo") -> None:
    """Features of answers that the file had before --features was given."""
    from contextlib import closing

    from vsd.data import Servers, load_examples
    from vsd.features import FeatureServer, TextStore

    store, examples = TextStore(folder, info), load_examples(a.out, info.tokenizer, a.max_length)
    if store.missing(examples):
        servers = Servers([FeatureServer(url, by.model, None, info) for url in by.server], by.requests_per_second)
        with closing(servers):
            servers.check()
            store.fill(lambda ids, drafted: servers.use(lambda one: one.text(ids, drafted)), examples, by.concurrency)
    print(f"{folder}: features of {len(examples)} texts")


COMMAND = Command(
    "Replace the answers of conversations by the target's own.",
    EXAMPLES,
    (Regenerate, ServerOptions, TargetOptions),
    run,
)
