"""`vsd import`."""

from dataclasses import dataclass, field
from pathlib import Path

from vsd.cli.parser import Command, Given
from vsd.cli.shared import load_info
from vsd.options import TargetOptions

EXAMPLES = """\
  vsd import --target T released-checkpoint runs/released/drafter
  vsd bench --target T --drafter runs/released/drafter --prompts prompts.jsonl
  vsd train --target T --drafter runs/released/drafter --data text.jsonl --output-dir runs/better"""


@dataclass
class Import:
    """import

    Attributes:
        checkpoint: folder or hub id of the released drafter
        out: folder to write
    """

    checkpoint: Path = field(metadata={"positional": True})
    out: Path = field(metadata={"positional": True})


def run(given: Given) -> None:
    """Convert the checkpoint."""
    from vsd.drafters.load import read_drafter
    from vsd.export import check_new
    from vsd.files import new_folder

    a = given.of(Import)
    check_new(a.out)
    drafter = read_drafter(a.checkpoint, load_info(given.of(TargetOptions)))
    with new_folder(a.out) as half:
        drafter.save_pretrained(half)
    print(f"drafter: {a.out}")


COMMAND = Command("Import a released drafter, to measure it or to train it.", EXAMPLES, (Import, TargetOptions), run)
