"""`vsd`: the command line. Every command reads its options and calls a Python function that does the work.

Nothing here imports torch before the options are known: help and mistakes in options are shown at once.
"""

import logging
import os
import sys
from collections.abc import Sequence

from vsd import __version__
from vsd.allocator import keep_freed_memory
from vsd.cli import (
    bench,
    check,
    demo,
    export,
    generate,
    import_,
    objectives,
    regenerate,
    report,
    server,
    synthesize,
    train,
    tune,
)
from vsd.cli.parser import CHOSEN, Command, Given, Group, Parser
from vsd.errors import VSDError
from vsd.files import file_error

EXAMPLES = """\
  vsd demo                                                 train a drafter in ten minutes and measure it
  vsd data regenerate prompts.jsonl --target T --out text.jsonl
  vsd train --target T --data text.jsonl --output-dir runs/mine
  vsd bench --target T --drafter runs/mine/drafter --prompts prompts.jsonl
  vsd generate --target T --drafter runs/mine/drafter "Why is the sky blue?"

A target T is a hub id, a folder, a .gguf file, or smollm2-135m, which comes with a PyPI wheel and is the default.
vsd COMMAND --help shows the options of a command."""

DATA_EXAMPLES = """\
  vsd data regenerate prompts.jsonl --target T --out text.jsonl
  vsd data synthesize --target T --out text.jsonl --tokens 1000000
  vsd data check text.jsonl --target T"""

DATA = Group(
    "Write training text with the target: a drafter learns to predict the target, so the target must have written it.",
    DATA_EXAMPLES,
    {
        "regenerate": regenerate.COMMAND,
        "server": server.COMMAND,
        "synthesize": synthesize.COMMAND,
        "check": check.COMMAND,
    },
)
VSD = Group(
    "Train, measure and run draft models of speculative decoding.",
    EXAMPLES,
    {
        "data": DATA,
        "train": train.COMMAND,
        "objectives": objectives.COMMAND,
        "generate": generate.COMMAND,
        "bench": bench.COMMAND,
        "tune": tune.COMMAND,
        "report": report.COMMAND,
        "export": export.COMMAND,
        "import": import_.COMMAND,
        "demo": demo.COMMAND,
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 with one line on stderr for a mistake, 130 when interrupted.

    Raises:
        SystemExit: with code 2 and one line on stderr for a mistake in the flags; with 0 after --help and --version.
    """
    try:
        command, given = _parse(argv)
        keep_freed_memory()
        _quiet()
        command.run(given)
    except VSDError as error:
        print(f"vsd: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"vsd: {file_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vsd: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(argv: Sequence[str] | None) -> tuple[Command, Given]:
    """The command that is asked for, and the options that it is given."""
    parser = Parser.of("vsd", VSD)
    parser.add_argument("--version", action="version", version=f"vsd {__version__}", help="show the version")
    parsers = parser.add_commands(VSD)
    command: Command | Group = VSD
    values = parser.parse_args(argv).as_dict()
    while isinstance(command, Group):
        name = values.get(CHOSEN)
        if name is None:
            parser.error(f"missing command: choose {', '.join(command.commands)}")
        command, values, parser = command.commands[name], values[name], parsers[f"{parser.prog} {name}"]
    given = Given(parser, values)
    for options in command.options:
        given.of(options)  # missing ones are reported before torch is imported
    return command, given


def _quiet() -> None:
    """No load reports and weight bars of transformers between our own output."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
