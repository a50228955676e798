"""`vsd tune`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from vsd.cli.parser import Command, Given
from vsd.cli.shared import command_line, load
from vsd.options import TargetOptions

EXAMPLES = """\
  vsd tune --target T --drafter runs/mine/drafter --prompts prompts.jsonl
  vsd tune --target T --drafter runs/mine/drafter --prompts prompts.jsonl --concurrency 8

The last line is the --tree of vsd generate and vsd bench."""


@dataclass
class Tune:
    """drafter and prompts

    Attributes:
        drafter: folder or hub id of the drafter
        prompts: prompt files (JSONL); the first turn of every prompt is used
        limit: prompts of each file
        max_new_tokens: longest answer in tokens
        json: JSON file for all trees, which vsd report shows
        concurrency: requests decoded together
    """

    drafter: str = field(metadata={"metavar": "FOLDER"})
    prompts: list[str] = field(metadata={"metavar": "FILE"})
    limit: int = 16
    max_new_tokens: int = 96
    json: Path | None = None
    concurrency: int = 1


def run(given: Given) -> None:
    """Find the fastest tree."""
    from vsd.data import prompt_inputs
    from vsd.decoding import Engine, Sampling
    from vsd.drafters import load_drafter
    from vsd.evaluation import load_prompts, print_trees, tune, write_json

    a = given.of(Tune)
    prompts = load_prompts(a.prompts, a.limit)
    target = load(given.of(TargetOptions))
    drafter = load_drafter(a.drafter, target)
    asked = [prompt_inputs(target.tokenizer, [{"role": "user", "content": p.turns[0]}], target.images) for p in prompts]
    results = Engine(target).generate(asked, Sampling(a.max_new_tokens))
    texts = [(result.prompt, result.tokens) for result in results]
    found = tune(target, drafter, texts, concurrency=a.concurrency)
    print_trees(found, concurrency=a.concurrency)
    if a.json:
        write_json({"trees": [asdict(tuned) for tuned in found], "command": command_line(given)}, a.json)


COMMAND = Command("Find the draft tree that is fastest on this machine.", EXAMPLES, (Tune, TargetOptions), run)
