"""`vsd data server`."""

from dataclasses import dataclass
from pathlib import Path

from vsd.cli.parser import Command, Given
from vsd.cli.shared import load_info
from vsd.errors import ConfigurationError
from vsd.options import TargetOptions

EXAMPLES = """\
  vsd data server --target T
  vsd data server --target T --family dflash --folder /mnt/shared/features

Run the printed command where vLLM is installed. The folder in its PYTHONPATH must be there; vsd need not be installed.
Options of vllm serve may be added, such as --tensor-parallel-size 8. Then
  vsd train --target T --data text.jsonl --features http://HOST:8000
  vsd data regenerate prompts.jsonl --target T --out text.jsonl --server http://HOST:8000 --model T --features DIR"""


@dataclass
class FeatureOptions:
    """features

    Attributes:
        family: family of the drafters that read them: eagle3 (default), peagle, dflash, dflash2, dspark or lm
        drafter: folder or hub id of a drafter that reads them, instead of a family
        folder: folder for features on their way, which server and trainer share: in memory on one machine, on a shared
            disk on several
    """

    family: str | None = None
    drafter: Path | None = None
    folder: str = "/dev/shm/vsd"


def run(given: Given) -> None:
    """Print the command."""
    import torch

    from vsd.drafters import draft_vocabulary, load_drafter, new_drafter
    from vsd.features.server import command
    from vsd.targets.load import resolve

    a, target = given.of(FeatureOptions), given.of(TargetOptions)
    if a.family is not None and a.drafter is not None:
        raise ConfigurationError("a drafter has a family: give --family or --drafter")
    info = load_info(target)
    if a.drafter is not None:
        drafter = load_drafter(a.drafter, info)
    else:
        drafter = new_drafter(info, draft_vocabulary(torch.tensor([0]), info.vocab_size, 1), a.family)
    print(command(resolve(target.target), drafter.needs.layers, info.config.num_hidden_layers, a.folder))


COMMAND = Command(
    "Print the vLLM command of a server that answers and gives the target's features.",
    EXAMPLES,
    (FeatureOptions, TargetOptions),
    run,
)
