"""`vsd data regenerate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vsd.cli.parser import Command, Given
from vsd.cli.shared import load, load_info, report_skipped
from vsd.errors import ConfigurationError
from vsd.options import TargetOptions

EXAMPLES = """\
  vsd data regenerate prompts.jsonl --target T --out text.jsonl --max-new-tokens 512
  vsd data regenerate prompts.jsonl --target T --out text.jsonl --server http://localhost:8000 --model NAME

With --server, a running vLLM, SGLang or other OpenAI-compatible server answers (key: $OPENAI_API_KEY); of the target
only the tokenizer is loaded. After an interruption, run the same command again: it continues."""


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
    """

    server: str | None = field(default=None, metadata={"metavar": "URL"})
    model: str | None = field(default=None, metadata={"metavar": "NAME"})
    concurrency: int = 32
    requests_per_second: float | None = None


def run(given: Given) -> None:
    """Replace answers by the target's own."""
    from itertools import chain, islice

    from vsd.data import Server, ServerTeacher, TargetTeacher, Teacher, read_conversations, regenerate

    a, by, target = given.of(Regenerate), given.of(ServerOptions), given.of(TargetOptions)
    if (by.server is None) != (by.model is None):
        raise ConfigurationError("a server and the name of its model go together: --server URL --model NAME")
    conversations = read_conversations(a.source, on_bad_line=a.on_bad_line, report=report_skipped, need_answer=False)
    first = next(conversations)  # a missing or unreadable source is known before the target is loaded
    texts = islice(chain([first], conversations), a.limit)
    teacher: Teacher
    if by.server is not None and by.model is not None:
        server = Server(by.server, by.model, by.requests_per_second)
        teacher = ServerTeacher(server, load_info(target), by.concurrency)
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
    print(f"{a.out}: {summary.written} answers, {summary.tokens} tokens, {summary.skipped} skipped")


COMMAND = Command(
    "Replace the answers of conversations by the target's own.",
    EXAMPLES,
    (Regenerate, ServerOptions, TargetOptions),
    run,
)
