"""`vsd bench`."""

from dataclasses import dataclass, field
from pathlib import Path

from vsd.cli.parser import Command, Given
from vsd.cli.shared import DecodingOptions, command_line, load
from vsd.options import TargetOptions

EXAMPLES = """\
  vsd bench --target T --drafter runs/a/drafter runs/b/drafter --prompts mt.jsonl --json out.json
  vsd bench --target T --drafter runs/a/drafter --prompts mt.jsonl --tree 3 --temperature 0 1"""


@dataclass
class Bench:
    """drafters and prompts

    Attributes:
        prompts: prompt files (JSONL), one or several turns each
        drafter: folders of drafters
        limit: use only this many prompts of each file, evenly spread
        json: JSON file for all results; FILE.html beside it shows them
        max_new_tokens: longest answer in tokens
        temperature: sampling temperatures, each measured in turn; 0 is greedy
        seed: seed of sampling
    """

    prompts: list[str] = field(metadata={"metavar": "FILE"})
    drafter: list[str] = field(default_factory=list, metadata={"metavar": "FOLDER"})
    limit: int | None = None
    json: Path | None = None
    max_new_tokens: int = 128
    temperature: list[float] = field(default_factory=lambda: [0.0])
    seed: int = 0


def run(given: Given) -> None:
    """Measure drafters."""
    from vsd.drafters import load_drafter
    from vsd.evaluation import Contender, bench, load_prompts, print_table, write_json
    from vsd.paths import TreeShape
    from vsd.report import runs_of, write_report

    a, d = given.of(Bench), given.of(DecodingOptions)
    shape, prompts = TreeShape.parse(d.tree), load_prompts(a.prompts, a.limit)
    target = load(given.of(TargetOptions), d.compile)
    contenders = [Contender(path, load_drafter(path, target), shape, d.verification) for path in a.drafter]
    report = bench(
        target, contenders, prompts, temperatures=a.temperature, max_new_tokens=a.max_new_tokens, seed=a.seed
    )
    print_table(report)
    if a.json:
        write_json(report | {"command": command_line(given)}, a.json)
        print(f"report: {write_report([a.json, *runs_of(a.drafter)], a.json.with_suffix('.html'))}")


COMMAND = Command(
    "Measure acceptance length and speed of drafters, against plain decoding.",
    EXAMPLES,
    (Bench, DecodingOptions, TargetOptions),
    run,
)
