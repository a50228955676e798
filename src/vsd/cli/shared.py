"""Options that several commands have, and the target that they name."""

import json
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vsd.cli.parser import Given, flag
from vsd.errors import ConfigurationError
from vsd.options import TargetOptions

if TYPE_CHECKING:
    from vsd.targets import Target, TargetInfo


@dataclass
class DecodingOptions:
    """speculative decoding

    Attributes:
        tree: draft tree: depth x top-k x nodes, as in 5x4x16: tokens drafted ahead, beam width, nodes verified in a
            target pass, root included; 5x4x16x0.05 leaves out nodes that the drafter gives less than this probability;
            5x4x16x0x8 adds 8 tokens of prompt lookup; 5 is a chain of 5 tokens
        verification: auto (greedy, or target sampling on trees) or rejection (rejection sampling of a sampled chain,
            for temperatures above 0)
        compile: compile the target's passes with torch.compile, which takes a minute or two
    """

    tree: str = "5x4x12"
    verification: Literal["auto", "rejection"] = "auto"
    compile: bool = False


def check_server(server: str | list[str] | None, model: str | None) -> None:
    """Raise if a server is given without the name of its model, or the name without a server."""
    if bool(server) != (model is not None):
        raise ConfigurationError("a server and the name of its model go together: --server URL --model NAME")


def load(options: TargetOptions, compiled: bool = False) -> "Target":
    """The target."""
    from vsd.targets import load_target

    return load_target(options.target, **options.loading, compiled=compiled)


def load_info(options: TargetOptions) -> "TargetInfo":
    """Its tokenizer, embedding and LM head, without the layers."""
    from vsd.targets import load_target_info

    return load_target_info(options.target, **options.loading)


def report_skipped(line: str) -> None:
    """Report an unusable line that is skipped."""
    print(f"vsd: skipped {line}", file=sys.stderr)


def command_line(given: Given) -> str:
    """The given options as a command line; for commands whose options are all flags."""
    words = given.parser.prog.split()
    for name, value in given.values.items():
        kept = value if isinstance(value, list) else [] if value is True else [value]
        words += [flag(name), *(json.dumps(v) if isinstance(v, dict) else str(v) for v in kept)]
    return shlex.join(words)
