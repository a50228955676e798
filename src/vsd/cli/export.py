"""`vsd export`."""

from dataclasses import dataclass, field
from pathlib import Path

from vsd.cli.parser import Command, Given
from vsd.cli.shared import load_info
from vsd.errors import DataError
from vsd.options import TargetOptions

EXAMPLES = """\
  vsd export --target T --format sglang runs/mine/drafter exported --bench runs/mine/bench.json

The command line of the engine that serves the drafter is printed, and stands in the model card."""


@dataclass
class Export:
    """export

    Attributes:
        drafter: folder or hub id of the drafter
        out: folder to write
        format: sglang, vllm, speculators (served by vLLM) or gguf (llama.cpp; eagle3 only)
        bench: JSON file of vsd bench, for the model card
    """

    drafter: Path = field(metadata={"positional": True})
    out: Path = field(metadata={"positional": True})
    format: str = field(metadata={"metavar": "FORMAT"})
    bench: Path | None = None


def run(given: Given) -> None:
    """Write the checkpoint, its model card, and the report that the card links."""
    from vsd.drafters.load import family_for, read_drafter
    from vsd.export import REPORT, check_new, export_drafter, model_card, serve_line
    from vsd.files import new_folder
    from vsd.report import runs_of, write_report

    a = given.of(Export)
    if a.bench is not None and not a.bench.exists():
        raise DataError(f"no file at '{a.bench}'")
    check_new(a.out)
    target = load_info(given.of(TargetOptions))
    drafter = read_drafter(a.drafter, target)
    sources = [*([a.bench] if a.bench else []), *runs_of([a.drafter])]
    with new_folder(a.out) as half:
        export_drafter(drafter, target, half, a.format)
        if sources:
            write_report(sources, half / REPORT)
        card = model_card(drafter, target, a.format, a.out, a.drafter, a.bench, report=bool(sources))
        (half / "README.md").write_text(card)
    print(f"{a.out}: to serve it,\n  {serve_line(family_for(drafter), a.format, target.name, a.out)}")


COMMAND = Command("Write a drafter in the format of a serving engine.", EXAMPLES, (Export, TargetOptions), run)
