"""`vsd data regenerate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vsd.cli.parser import Command, Given
from vsd.cli.shared import load, load_info, report_skipped
from vsd.errors import ConfigurationError
from vsd.options import TargetOptions

if TYPE_CHECKING:
    from vsd.targets import TargetInfo

EXAMPLES = """\
  vsd data regenerate prompts.jsonl --target T --out text.jsonl --max-new-tokens 512
  vsd data regenerate prompts.jsonl --target T --out text.jsonl --server http://localhost:8000 --model NAME
  vsd data regenerate prompts.jsonl --target T --out text.jsonl --server URL --model NAME --features features/

With --server, a running vLLM, SGLang or other OpenAI-compatible server answers (key: $OPENAI_API_KEY); of the target
only the tokenizer is loaded. With --features, vLLM started as vsd data server says also gives the target's features.
After an interruption, run the same command again: it continues."""


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
        server: URL of a server that answers instead, such as http://localhost:8000
        model: name under which the server has the target
        concurrency: requests in flight
        requests_per_second: highest rate of requests
        features: folder that keeps the target's features of all answers in OUT, for vsd train --features
    """

    server: str | None = field(default=None, metadata={"metavar": "URL"})
    model: str | None = field(default=None, metadata={"metavar": "NAME"})
    concurrency: int = 32
    requests_per_second: float | None = None
    features: Path | None = None


def run(given: Given) -> None:
    """Replace answers by the target's own."""
    from itertools import chain, islice

    from vsd.data import Server, ServerTeacher, TargetTeacher, Teacher, read_conversations, regenerate
    from vsd.features import KeepingServer

    a, by, target = given.of(Regenerate), given.of(ServerOptions), given.of(TargetOptions)
    if (by.server is None) != (by.model is None):
        raise ConfigurationError("a server and the name of its model go together: --server URL --model NAME")
    if by.features is not None and by.server is None:
        raise ConfigurationError("features of answers come from a server (--server URL); vsd train makes its own store")
    conversations = read_conversations(a.source, on_bad_line=a.on_bad_line, report=report_skipped, need_answer=False)
    first = next(conversations)  # a missing or unreadable source is known before the target is loaded
    texts = islice(chain([first], conversations), a.limit)
    teacher: Teacher
    if by.server is not None and by.model is not None:
        info, address = load_info(target), (by.server, by.model, by.requests_per_second)
        server = Server(*address) if by.features is None else KeepingServer(*address, info, by.features)
        teacher = ServerTeacher(server, info, by.concurrency)
    else:
        teacher = TargetTeacher(load(target), a.batch_size)
    summary = regenerate(
        teacher,
        texts,
        a.out,
        max_new_tokens=a.max_new_tokens,
        temperature=a.temperature,
        seed=a.seed,
        max_length=a.max_length,
        on_bad_line=a.on_bad_line,
        report=report_skipped,
    )
    if by.features is not None and by.server is not None:
        _add_missing(a, by, by.server, by.features, teacher.info)
    print(f"{a.out}: {summary.written} answers, {summary.tokens} tokens, {summary.skipped} skipped")


def _add_missing(a: Regenerate, by: ServerOptions, url: str, folder: Path, info: "TargetInfo") -> None:
    """Features of answers that the file had before --features was given."""
    from vsd.data import load_examples
    from vsd.features import FeatureServer, TextStore

    store, examples = TextStore(folder, info), load_examples(a.out, info.tokenizer, a.max_length)
    if store.missing(examples):
        server = FeatureServer(url, by.model, by.requests_per_second, info)
        server.check()
        store.fill(server, examples, by.concurrency)
    print(f"{folder}: features of {len(examples)} texts")


COMMAND = Command(
    "Replace the answers of conversations by the target's own.",
    EXAMPLES,
    (Regenerate, ServerOptions, TargetOptions),
    run,
)
