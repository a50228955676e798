"""`vsd bench`."""

from dataclasses import dataclass, field
from pathlib import Path

from vsd.cli.parser import Command, Given
from vsd.cli.shared import DecodingOptions, load
from vsd.options import TargetOptions

EXAMPLES = """\
  vsd bench --target T --drafter runs/a/drafter runs/b/drafter --prompts mt.jsonl --json out.json
  vsd bench --target T --drafter runs/a/drafter --prompts mt.jsonl --tree 3 --temperature 0 1
  vsd bench --target T --drafter runs/a/drafter --prompts mt.jsonl --concurrency 1 4 16

Prompt lines may have the fields category, source, language and thinking:
τ is then reported for each of their values."""


@dataclass
class Bench:
    """drafters and prompts

    Attributes:
        prompts: prompt files (JSONL), one or several turns each
        drafter: folders of drafters
        limit: use only this many prompts of each file, evenly spread
        json: JSON file for all results
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


def run(given: Given) -> None:
    """Measure drafters."""
    from vsd.drafters import load_drafter
    from vsd.evaluation import Contender, bench, load_prompts, print_details, print_table, trained_length, write_json
    from vsd.paths import TreeShape

    a, d = given.of(Bench), given.of(DecodingOptions)
    shape, prompts = TreeShape.parse(d.tree), load_prompts(a.prompts, a.limit)
    target = load(given.of(TargetOptions), d.compile)
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
    if a.json:
        write_json(report, a.json)


COMMAND = Command(
    "Measure acceptance length and speed of drafters, against plain decoding.",
    EXAMPLES,
    (Bench, DecodingOptions, TargetOptions),
    run,
)
