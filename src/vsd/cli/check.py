"""`vsd data check`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vsd.cli.parser import Command, Given
from vsd.cli.shared import load_info, report_skipped
from vsd.options import TargetOptions, draft_vocabulary_size

if TYPE_CHECKING:
    from rich.console import Console

    from vsd.data import TextCount
    from vsd.targets import TargetInfo

EXAMPLES = """\
  vsd data check text.jsonl --target T
  vsd data check folder --target T --max-length 4096

Lines that cannot be trained on are named on stderr. Of the target only the tokenizer and the configuration are read."""

_DATED = (
    "the chat template prints the current date: tomorrow the text is another one, also for a feature store; "
    "`vsd data regenerate` records prompts with their date"
)


@dataclass
class Check:
    """conversations

    Attributes:
        source: file, folder or hub dataset, as for vsd train
        max_length: longest conversation in tokens; a longer one is an unusable line
    """

    source: str = field(metadata={"positional": True})
    max_length: int = 2048


def run(given: Given) -> None:
    """Print what would be trained."""
    from rich.console import Console

    from vsd.data import count_text, encoded

    a, skipped = given.of(Check), list[str]()
    info = load_info(given.of(TargetOptions))

    def report(line: str) -> None:
        skipped.append(line)
        report_skipped(line)

    texts = encoded(a.source, info.tokenizer, a.max_length, "skip", report, images=info.images)
    count = count_text(info.tokenizer, texts)
    console = Console(highlight=False)
    for name, value in _rows(count, info, len(skipped)):
        console.print(f"{name:<18}{value}", markup=False, soft_wrap=True)
    _print_sample(console, count, info)


def _rows(count: "TextCount", info: "TargetInfo", skipped: int) -> list[tuple[str, str]]:
    """Names and values of all counts."""
    supervised, size = count.supervised.total(), draft_vocabulary_size(None, info.hidden_size, info.vocab_size)
    covered = sum(number for _, number in count.supervised.most_common(size))
    return [
        ("conversations", f"{count.conversations}, {skipped} skipped"),
        ("answers", f"{count.answers}, {count.cut} cut off"),
        ("sequences", f"{count.sequences}, the longest has {count.longest[0]} tokens ({count.longest[1]})"),
        ("tokens", f"{count.tokens}, {supervised} supervised ({supervised / count.tokens:.1%})"),
        ("draft vocabulary", f"{size} of {info.vocab_size} tokens cover {covered / supervised:.1%} of the supervised"),
        ("thinking", ", ".join(f"{kind}: {number}" for kind, number in count.thinking.most_common())),
        ("duplicates", f"{count.repeated} conversations, {count.repeated_ids} ids"),
        *([("date", _DATED)] if count.dated else []),
    ]


def _print_sample(console: "Console", count: "TextCount", info: "TargetInfo") -> None:
    """The first conversation: supervised tokens are green on a terminal and in brackets elsewhere."""
    from rich.text import Text

    from vsd.data import marked_text

    conversation, examples = count.sample
    marks = "green" if console.is_terminal else "in ⟦ ⟧"
    console.print(f"\n{conversation.where}, supervised tokens {marks}:", markup=False, soft_wrap=True)
    for example in examples:
        text = Text()
        for piece, supervised in marked_text(info.tokenizer, example):
            plain = supervised and not console.is_terminal
            text.append(f"⟦{piece}⟧" if plain else piece, style="green" if supervised else None)
        console.print(text, soft_wrap=True)


COMMAND = Command("Show what would be trained: counts, and one conversation.", EXAMPLES, (Check, TargetOptions), run)
