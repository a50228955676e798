"""Training text without a data set: the target writes the user turns, then answers them.

Given the chat template up to the beginning of a user turn, an instruction-tuned model continues with a plausible
request (Magpie, arXiv:2406.08464). Dropped are user turns that are unfinished, very short or repeated, and those that
hold control tokens or broken characters. The others are answered as regeneration answers a prompt.

Batch i is a function of the settings and the batches before it, so a run that was killed continues where it stopped.
"""

from pathlib import Path
from typing import NamedTuple

from vsd.data.generate import Answer, derive_seed, generate_batch
from vsd.data.progress import progress_bar
from vsd.data.questions import Question
from vsd.data.records import Entry, GenerationSettings, RecordLog, Summary
from vsd.data.regenerate import write_answers
from vsd.data.target_teacher import TargetTeacher
from vsd.data.template import answer_text, control_ids, prompt_inputs, render, tokenize
from vsd.errors import ConfigurationError, TargetError
from vsd.targets.inputs import Inputs
from vsd.targets.target import Target

_MAX_TURN_TOKENS = 128
_MIN_TURN_TOKENS = 5  # with the end-of-turn token
_MAX_EMPTY_BATCHES = 20  # after so many batches without one usable turn, synthesis fails
_PLACEHOLDER = "USERTEXT"


def synthesize(
    target: Target,
    out: Path,
    *,
    conversations: int | None = None,
    tokens: int | None = None,
    max_new_tokens: int = 256,
    prompt_temperature: float = 1.0,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Summary:
    """Write conversations until `out` holds enough of them; `out` is resumed, or extended, if it exists.

    Args:
        conversations: how many to write, exactly.
        tokens: answer tokens to write; the batch that reaches the number is finished.
        prompt_temperature: of the user turns; `temperature` is that of the answers.

    Raises:
        ConfigurationError: neither `conversations` nor `tokens`.
        MismatchError: `out` was begun with other settings.
        TargetError: the target writes no usable user turn.
        DataError: `out` is damaged, or the chat template does not print a user's text unchanged.
    """
    if conversations is None and tokens is None:
        raise ConfigurationError("synthesis needs an end: give the number of conversations or of tokens")
    teacher, settings = TargetTeacher(target, batch_size), GenerationSettings(max_new_tokens, temperature, seed)
    header = {
        **teacher.settings,
        "kind": "synthesize",
        "prompt_temperature": prompt_temperature,
        **settings._asdict(),
    }
    writer = TurnWriter(target, user_opening(target), prompt_temperature, seed, batch_size)
    with RecordLog(Path(out), header) as log, progress_bar(enabled=progress) as bar:
        kept, number = Kept.resumed(log, Wanted(conversations, tokens))
        task = bar.add_task("synthesize", total=conversations or tokens, completed=kept.progress, tokens=0)
        before, dropped, empty = log.tokens, 0, 0
        while not kept.enough:
            questions = writer.questions(number, kept.asked)
            dropped += batch_size - len(questions)
            questions = questions[: kept.missing]
            answers = teacher.answer(number, questions, log, settings)
            entries = write_answers(log, teacher.info, number, questions, answers, settings)
            kept.add([entry for entry in entries if entry is not None])
            empty = 0 if any(entries) else empty + 1
            if empty == _MAX_EMPTY_BATCHES:
                raise TargetError(f"the target wrote no usable user turn in {empty * batch_size} tries: bring prompts")
            number += 1
            bar.update(task, completed=kept.progress, tokens=log.tokens - before)
    return Summary(len(kept.entries), dropped, kept.tokens, sum(entry.cut for entry in kept.entries))


class Wanted(NamedTuple):
    """How much to write."""

    conversations: int | None
    tokens: int | None


class Kept:
    """The conversations written so far."""

    def __init__(self, entries: list[Entry], wanted: Wanted) -> None:
        self.wanted = wanted
        self.entries: list[Entry] = []
        self.asked: set[str] = set()
        self.tokens = 0
        self.add(entries)

    @classmethod
    def resumed(cls, log: RecordLog, wanted: Wanted) -> "tuple[Kept, int]":
        """The conversations in the file and the number of the next batch.

        The file's last batch may be incomplete: unless the file holds enough, this batch is made again.
        """
        entries, number = log.entries(), max(log.last_batch, 0)
        kept = cls(entries, wanted)
        return (kept if kept.enough else cls([entry for entry in entries if entry.batch < number], wanted)), number

    def add(self, entries: list[Entry]) -> None:
        """Add the conversations of one batch."""
        self.entries += entries
        self.asked |= {normalized(entry.question) for entry in entries}
        self.tokens += sum(entry.tokens for entry in entries)

    @property
    def missing(self) -> int | None:
        """Conversations still to write; None where only tokens count."""
        return None if self.wanted.conversations is None else self.wanted.conversations - len(self.entries)

    @property
    def enough(self) -> bool:
        """Whether either number is reached."""
        by_count = self.missing is not None and self.missing <= 0
        return by_count or (self.wanted.tokens is not None and self.tokens >= self.wanted.tokens)

    @property
    def progress(self) -> int:
        """For the progress bar: conversations, or tokens where only tokens count."""
        return self.tokens if self.wanted.conversations is None else len(self.entries)


class Opening(NamedTuple):
    """The template's tokens before the text of a user turn, and the tokens that end the turn."""

    ids: list[int]
    stop_ids: set[int]


def user_opening(target: Target) -> Opening:
    """Find in the chat template where the text of a user turn begins and which token ends it.

    Raises:
        DataError: the template does not print the text of a user turn unchanged.
    """
    text = render(target.tokenizer, [{"role": "user", "content": _PLACEHOLDER}], answer_next=True)
    before, _, after = text.partition(_PLACEHOLDER)
    control = control_ids(target.tokenizer)
    end = [token for token in tokenize(target.tokenizer, after) if token in control]
    ids = tokenize(target.tokenizer, before.rstrip(" "))
    return Opening(ids, {*target.eos_ids, *end[:1]})


class TurnWriter(NamedTuple):
    """Samples user turns from the target."""

    target: Target
    opening: Opening
    temperature: float
    seed: int
    batch_size: int

    def questions(self, number: int, asked: set[str]) -> list[Question]:
        """The usable turns of batch `number`, without those in `asked` (normalized) and repetitions."""
        sampled = generate_batch(
            self.target,
            [Inputs(self.opening.ids)] * self.batch_size,
            max_new_tokens=_MAX_TURN_TOKENS,
            temperature=self.temperature,
            seed=derive_seed(self.seed, "turns", number),
            stop_ids=self.opening.stop_ids,
        )
        asked, questions = set(asked), []
        for row, turn in enumerate(sampled):
            text = usable_text(self.target, turn)
            if text is not None and normalized(text) not in asked:
                asked.add(normalized(text))
                questions.append(self._question(number * self.batch_size + row, text))
        return questions

    def _question(self, index: int, text: str) -> Question:
        messages = [{"role": "user", "content": text}]
        return Question(f"synth-{index + 1:05d}", messages, prompt_inputs(self.target.tokenizer, messages))


def usable_text(target: Target, turn: Answer) -> str | None:
    """The text of a user turn; None if it is unfinished, very short, or has markup or broken characters in it."""
    ids = turn.ids[:-1]
    if turn.finish != "stop" or len(turn.ids) < _MIN_TURN_TOKENS:
        return None
    text = answer_text(target.tokenizer, ids).strip()
    clean = control_ids(target.tokenizer).isdisjoint(ids) and "\ufffd" not in text
    return text if clean and text else None


def normalized(text: str) -> str:
    """The letters and digits of a text in lower case: equal for turns that count as repetitions."""
    return "".join(c for c in text.casefold() if c.isalnum())
