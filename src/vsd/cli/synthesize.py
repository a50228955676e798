"""`vsd data synthesize`."""

from dataclasses import dataclass
from pathlib import Path

from vsd.cli.parser import Command, Given
from vsd.cli.shared import load
from vsd.errors import ConfigurationError
from vsd.options import TargetOptions

EXAMPLES = """\
  vsd data synthesize --target T --out text.jsonl --tokens 1000000

No data set is needed: the target writes the questions, too. Run the same command again to continue, or with more
--tokens to extend the text."""


@dataclass
class Synthesize:
    """conversations

    Attributes:
        out: JSONL file to write; an existing one is continued
        tokens: stop after this many answer tokens
        conversations: stop after this many conversations
        max_new_tokens: longest answer in tokens
        temperature: sampling temperature of answers; 0 is greedy
        prompt_temperature: sampling temperature of questions
        batch_size: conversations that are generated together
        seed: seed of sampling
    """

    out: Path
    tokens: int | None = None
    conversations: int | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    prompt_temperature: float = 1.0
    batch_size: int = 64
    seed: int = 0


def run(given: Given) -> None:
    """Write text."""
    from vsd.data import synthesize

    a = given.of(Synthesize)
    if a.conversations is None and a.tokens is None:
        raise ConfigurationError("the amount of text is missing: give --tokens N or --conversations N")
    summary = synthesize(
        load(given.of(TargetOptions)),
        a.out,
        conversations=a.conversations,
        tokens=a.tokens,
        max_new_tokens=a.max_new_tokens,
        prompt_temperature=a.prompt_temperature,
        temperature=a.temperature,
        seed=a.seed,
        batch_size=a.batch_size,
    )
    print(f"{a.out}: {summary.written} conversations, {summary.tokens} answer tokens")


COMMAND = Command("Write questions and answers with the target.", EXAMPLES, (Synthesize, TargetOptions), run)
