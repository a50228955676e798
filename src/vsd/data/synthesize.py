"""Training text without any data: the target writes the user turns too, then answers them.

Given the chat template up to where a user's words begin, an instruction-tuned model continues with
something a user would say (Magpie, arXiv:2406.08464). Unusable turns are dropped: unfinished or very short
ones, ones with control tokens or broken characters inside, and repetitions. The rest are answered by the
code that answers real prompts.

All is a function of the settings and the number of the batch, so a killed run continues where it stopped.
"""

from pathlib import Path
from typing import NamedTuple

from vsd.data.generate import Answer, derive_seed, generate_batch
from vsd.data.questions import Question, Sampling, Summary
from vsd.data.records import Entry, RecordLog, progress_bar
from vsd.data.regenerate import answer_batch, describe
from vsd.data.template import control_ids, prompt_ids, render, spell, tokenize
from vsd.errors import VSDError
from vsd.targets.target import Target

_MAX_TURN_TOKENS = 128
_MIN_TURN_TOKENS = 5  # with the end-of-turn token
_BARREN_BATCHES = 20  # so many batches without one usable turn, and we give up
_SENTINEL = "USERWORDS"


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
    """Write conversations made by the target alone, until there are enough.

    `conversations` is met exactly; `tokens`, answer tokens, at the end of the batch that reaches it.

    `out` is resumed when it exists, also to make it longer.

    Raises:
        VSDError: no limit given, `out` cannot be resumed, or the target writes nothing like a user turn.
    """
    if conversations is None and tokens is None:
        raise VSDError("synthesis needs an end: say how many conversations or how many tokens")
    settings = {
        "kind": "synthesize",
        **describe(target),
        "max_new_tokens": max_new_tokens,
        "prompt_temperature": prompt_temperature,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
    }
    opening = user_opening(target)
    sampling = Sampling(max_new_tokens, temperature, seed)
    with RecordLog(Path(out), settings) as log, progress_bar(enabled=progress) as bar:
        kept = _Kept([*log.entries.values()], conversations, tokens)
        task = bar.add_task("synthesize", total=conversations or tokens, completed=kept.progress, tokens=0)
        number = max(log.last_batch, 0)
        on_disk = kept.tokens
        dropped = barren = 0
        if not kept.enough:  # the last batch seen may be incomplete: it is made again
            kept = _Kept([e for e in log.entries.values() if e.batch < number], conversations, tokens)
        while not kept.enough:
            turns = write_turns(target, opening, prompt_temperature, seed, number, batch_size, kept.asked)
            dropped += batch_size - len(turns)
            questions = [_question(target, number * batch_size + row, text) for row, text in turns]
            entries = answer_batch(target, log, number, questions[: kept.missing], sampling)
            kept.add([entry for entry in entries if entry is not None])
            barren = 0 if any(entries) else barren + 1
            if barren == _BARREN_BATCHES:
                raise VSDError(f"the target wrote no usable user turn in {barren * batch_size} tries: bring prompts")
            number += 1
            bar.update(task, completed=kept.progress, tokens=max(0, kept.tokens - on_disk))
    return Summary(len(kept.entries), dropped, kept.tokens)


class _Kept:
    """The conversations so far, and whether they are enough."""

    def __init__(self, entries: list[Entry], conversations: int | None, tokens: int | None) -> None:
        self.conversations, self.wanted_tokens = conversations, tokens
        self.entries: list[Entry] = []
        self.asked: set[str] = set()
        self.tokens = 0
        self.add(entries)

    def add(self, entries: list[Entry]) -> None:
        self.entries += entries
        self.asked |= {normal(entry.question) for entry in entries}
        self.tokens += sum(entry.tokens for entry in entries)

    @property
    def missing(self) -> int | None:
        return None if self.conversations is None else self.conversations - len(self.entries)

    @property
    def enough(self) -> bool:
        by_count = self.conversations is not None and len(self.entries) >= self.conversations
        return by_count or (self.wanted_tokens is not None and self.tokens >= self.wanted_tokens)

    @property
    def progress(self) -> int:
        return self.tokens if self.conversations is None else len(self.entries)


class Opening(NamedTuple):
    """The template up to the user's first word, and the tokens that end a user's turn."""

    ids: list[int]
    stop_ids: set[int]


def user_opening(target: Target) -> Opening:
    """Read off the chat template where a user's turn begins and which token ends it."""
    text = render(target.tokenizer, [{"role": "user", "content": _SENTINEL}], answer_next=True)
    before, found, after = text.partition(_SENTINEL)
    if not found:
        raise VSDError("the chat template does not print the user's words as they are: bring prompts instead")
    control = control_ids(target.tokenizer)
    end = [token for token in tokenize(target.tokenizer, after) if token in control]
    ids = tokenize(target.tokenizer, before.rstrip(" "))
    return Opening(ids, {*target.eos_ids, *end[:1]})


def write_turns(
    target: Target,
    opening: Opening,
    temperature: float,
    seed: int,
    number: int,
    batch_size: int,
    asked: set[str],
) -> list[tuple[int, str]]:
    """User turns of batch `number` with their rows, without the unusable ones and those in `asked`."""
    drawn = generate_batch(
        target,
        [opening.ids] * batch_size,
        max_new_tokens=_MAX_TURN_TOKENS,
        temperature=temperature,
        seed=derive_seed(seed, "turns", number),
        stop_ids=opening.stop_ids,
    )
    asked, turns = set(asked), []
    for row, answer in enumerate(drawn):
        text = usable_text(target, answer)
        if text is not None and normal(text) not in asked:
            asked.add(normal(text))
            turns.append((row, text))
    return turns


def usable_text(target: Target, turn: Answer) -> str | None:
    """The words of a user turn; None if unfinished, very short, or with markup or broken characters in it."""
    words = turn.ids[:-1]
    if turn.finish != "stop" or len(turn.ids) < _MIN_TURN_TOKENS:
        return None
    text = spell(target.tokenizer, words).strip()
    clean = control_ids(target.tokenizer).isdisjoint(words) and "\ufffd" not in text
    return text if clean and text else None


def normal(text: str) -> str:
    """What two turns have in common that differ only in case, spacing and punctuation."""
    return "".join(c for c in text.casefold() if c.isalnum())


def _question(target: Target, slot: int, text: str) -> Question:
    messages = [{"role": "user", "content": text}]
    return Question(f"synth-{slot + 1:05d}", messages, prompt_ids(target.tokenizer, messages))
