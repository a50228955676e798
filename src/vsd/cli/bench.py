"""`vsd bench`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vsd.cli.parser import Command, Given
from vsd.cli.shared import DecodingOptions, check_server, command_line, load
from vsd.errors import ConfigurationError
from vsd.options import TargetOptions

EXAMPLES = """\
  vsd bench --target T --drafter runs/a/drafter runs/b/drafter --prompts mt.jsonl --json out.json
  vsd bench --target T --drafter runs/a/drafter --prompts mt.jsonl --tree 3 --temperature 0 1
  vsd bench --target T --drafter runs/a/drafter --prompts mt.jsonl --concurrency 1 4 16

Prompt lines may have the fields category, source, language and thinking:
τ is then reported for each of their values.

  vsd bench --target T --drafter D --prompts mt.jsonl --server http://localhost:8000 --model NAME

compares a running vLLM or SGLang that serves T with D (key: $OPENAI_API_KEY): its acceptance, by its own counters, with
the same chain here, and its answers with plain decoding here, at temperature 0. Nothing else may use the server."""


@dataclass
class Bench:
    """drafters and prompts

    Attributes:
        prompts: prompt files (JSONL), one or several turns each
        drafter: folders or hub ids of drafters
        limit: use only this many prompts of each file, evenly spread
        json: JSON file for all results; FILE.html beside it shows them
        max_new_tokens: longest answer in tokens
        temperature: sampling temperatures, each measured in turn; 0 is greedy
        seed: seed of sampling
        concurrency: prompts decoded together; several numbers are measured in turn, the first gives the main table
    """

    prompts: list[str] = field(metadata={"metavar": "FILE"})
    drafter: list[str] = field(default_factory=list, metadata={"metavar": "FOLDER"})
    limit: int | None = None
    json: Path | None = None
    max_new_tokens: int = 128
    temperature: list[float] = field(default_factory=lambda: [0.0])
    seed: int = 0
    concurrency: list[int] = field(default_factory=lambda: [1], metadata={"metavar": "N"})


@dataclass
class ServerOptions:
    """server

    Attributes:
        server: URL of a running vLLM or SGLang to compare with, such as http://localhost:8000
        model: name under which the server has the target
    """

    server: str | None = field(default=None, metadata={"metavar": "URL"})
    model: str | None = field(default=None, metadata={"metavar": "NAME"})


def run(given: Given) -> None:
    """Measure drafters, or compare a server."""
    a, by, target = given.of(Bench), given.of(ServerOptions), given.of(TargetOptions)
    check_server(by.server, by.model)
    if by.server is not None and by.model is not None:
        _beside(by.server, by.model, a, target, command_line(given))
    else:
        _measure(a, given.of(DecodingOptions), target, command_line(given))


def _beside(url: str, model: str, a: Bench, options: TargetOptions, command: str) -> None:
    """Compare a server with this engine."""
    from vsd.data import Server
    from vsd.drafters import load_drafter
    from vsd.evaluation import compare, connect, load_prompts, print_server

    if len(a.drafter) > 1 or any(a.temperature) or a.concurrency != [1]:
        raise ConfigurationError(
            "a server is compared with one drafter, at temperature 0 and one request at a time: "
            "leave out --temperature, --concurrency and further drafters"
        )
    prompts, server = load_prompts(a.prompts, a.limit), Server(url, model)
    try:
        serving = connect(server)
        target = load(options)
        drafter = load_drafter(a.drafter[0], target) if a.drafter else None
        report = compare(target, serving, prompts, drafter, max_new_tokens=a.max_new_tokens)
    finally:
        server.close()
    print_server(report)
    _write(report, a, command)


def _measure(a: Bench, d: DecodingOptions, options: TargetOptions, command: str) -> None:
    """Measure drafters here."""
    from vsd.drafters import load_drafter
    from vsd.evaluation import Contender, bench, load_prompts, print_details, print_table, trained_length
    from vsd.paths import TreeShape

    shape, prompts = TreeShape.parse(d.tree), load_prompts(a.prompts, a.limit)
    target = load(options, d.compile)
    contenders = [
        Contender(path, load_drafter(path, target), shape, d.verification, trained_length(path, target))
        for path in a.drafter
    ]
    report = bench(
        target,
        contenders,
        prompts,
        temperatures=a.temperature,
        concurrency=a.concurrency,
        max_new_tokens=a.max_new_tokens,
        seed=a.seed,
    )
    print_table(report)
    print_details(report)
    _write(report, a, command)


def _write(report: dict[str, Any], a: Bench, command: str) -> None:
    """Write the results and a page beside them, if they are wanted."""
    from vsd.evaluation import write_json
    from vsd.report import runs_of, write_report

    if a.json:
        write_json(report | {"command": command}, a.json)
        print(f"report: {write_report([a.json, *runs_of(a.drafter)], a.json.with_suffix('.html'))}")


COMMAND = Command(
    "Measure acceptance length and speed of drafters, against plain decoding.",
    EXAMPLES,
    (Bench, DecodingOptions, ServerOptions, TargetOptions),
    run,
)
