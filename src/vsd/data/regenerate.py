"""Replace every answer of a data set by the target's own: a drafter must learn what its target says.

Each user turn is answered in order, with the target's earlier answers as history, and every answer becomes
one record that carries its exact tokens. The work is cut into numbered batches that depend only on the
prompts and the settings, so a killed run continues at the batch it was in, and ends with the file that a
straight run would have written.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vsd.data.chat import LOG, BadLineError, Conversation, Message, OnBadLine, Report, handle_bad_line
from vsd.data.generate import Answer, derive_seed, generate_batch, plan_batches
from vsd.data.records import Entry, Record, RecordLog, progress_bar
from vsd.data.template import prompt_ids, spell
from vsd.errors import VSDError
from vsd.targets.target import Target

_WINDOW = 16  # batches' worth of conversations that are sorted by length together


class Summary(NamedTuple):
    """Answers in the file, conversations or turns that are not, and the answer tokens in the file."""

    written: int
    skipped: int
    tokens: int


class Question(NamedTuple):
    """One user turn to answer: `messages` end with it, `ids` is what the target reads."""

    id: str
    messages: list[Message]
    ids: list[int]


class Sampling(NamedTuple):
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float
    seed: int


def regenerate(
    target: Target,
    conversations: Iterable[Conversation],
    out: Path,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    max_length: int | None = None,
    on_bad_line: OnBadLine = "fatal",
    report: Report | None = None,
    progress: bool = True,
) -> Summary:
    """Answer every user turn of `conversations` with the target; `out` is resumed when it exists.

    Args:
        max_length: longest prompt and answer together; default the target's context. A conversation whose
            first prompt is longer is a bad line; one that outgrows it later ends there.
        report: called with one line for everything that is skipped; default a logged warning.

    Raises:
        VSDError: a bad line, when fatal; `out` cannot be resumed; nothing to answer.
    """
    report = report or LOG.warning
    context = getattr(target.config, "max_position_embeddings", None) or sys.maxsize
    room = (max_length or context) - max_new_tokens
    chats, skipped = _open_chats(target, conversations, room, on_bad_line, report)
    settings = {
        "kind": "regenerate",
        **describe(target),
        "prompts": _digest([[c.id, c.history, c.turns, c.exact] for c in chats]),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
        "max_length": max_length,
    }
    sampling = Sampling(max_new_tokens, temperature, seed)
    written = tokens = made = 0
    with RecordLog(Path(out), settings) as log, progress_bar(enabled=progress) as bar:
        total = sum(len(c.turns) for c in chats)
        task = bar.add_task("regenerate", total=total, completed=len(log.entries), tokens=0)
        for number, batch in enumerate(_batches(target, chats, batch_size, room, report)):
            answers = answer_batch(target, log, number, [question for _, question in batch], sampling)
            for (chat, question), entry in zip(batch, answers, strict=True):
                if entry is None:
                    chat.end()
                    report(f"{chat.where}: the target's answer to '{question.id}' is empty")
                    continue
                chat.answered(entry.answer)
                written, tokens = written + 1, tokens + entry.tokens
                made += entry.tokens if entry.id not in log.entries else 0
            bar.update(task, completed=max(written, len(log.entries)), tokens=made)
        skipped += total - written
    return Summary(written, skipped, tokens)


def answer_batch(
    target: Target, log: RecordLog, number: int, questions: list[Question], sampling: Sampling
) -> list[Entry | None]:
    """Answers to batch `number`: out of the log, or made now and appended; None for empty ones."""
    if number < log.last_batch or all(q.id in log.entries for q in questions):
        return [log.entries.get(q.id) for q in questions]
    answers = generate_batch(
        target,
        [q.ids for q in questions],
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=derive_seed(sampling.seed, [q.ids for q in questions]),
    )
    made = [_record(target, q, a, number, sampling) for q, a in zip(questions, answers, strict=True)]
    log.append([record for record in made if record is not None and record["id"] not in log.entries])
    return [
        log.entries.get(q.id) or (None if record is None else Entry.of(record))
        for q, record in zip(questions, made, strict=True)
    ]


def describe(target: Target) -> dict[str, str]:
    """What of the target decides the records: weights and chat template."""
    return {"target": target.fingerprint(), "chat_template": _digest(target.tokenizer.chat_template)}


@dataclass
class _Chat:
    """A conversation while it is being answered."""

    id: str
    where: str
    history: list[Message]  # the system message, then answered turns
    turns: list[str]  # user turns
    exact: list[int] | None  # the prompt's tokens, where the line has no text
    asked: int = 0  # how many turns have been answered

    def question(self, target: Target) -> Question | None:
        """The next user turn, if there is one."""
        if self.asked == len(self.turns):
            return None
        messages = [*self.history, {"role": "user", "content": self.turns[self.asked]}]
        if self.exact is not None:
            return Question(f"{self.id}/{self.asked}", [], self.exact)
        return Question(f"{self.id}/{self.asked}", messages, prompt_ids(target.tokenizer, messages))

    def answered(self, answer: str) -> None:
        self.history.append({"role": "user", "content": self.turns[self.asked]})
        self.history.append({"role": "assistant", "content": answer})
        self.asked += 1

    def end(self) -> None:
        self.asked = len(self.turns)


def _open_chats(
    target: Target,
    conversations: Iterable[Conversation],
    room: int,
    on_bad_line: OnBadLine,
    report: Report | None,
) -> tuple[list[_Chat], int]:
    """Chats whose first prompt fits into `room` tokens, with ids made unique, and how many there are not."""
    chats, seen, skipped = [], dict[str, int](), 0
    for given in conversations:
        seen[given.id] = seen.get(given.id, 0) + 1
        name = given.id if seen[given.id] == 1 else f"{given.id}~{seen[given.id]}"
        turns = [m["content"] for m in given.messages if m["role"] == "user"]
        system = [m for m in given.messages[:1] if m["role"] == "system"]
        exact = None if turns else given.prompt_ids
        chat = _Chat(name, given.where, system, turns or [""], exact)
        try:
            question = chat.question(target)
            if question is None or len(question.ids) > room:
                raise BadLineError(f"too long: the prompt leaves no room for an answer ({max(room, 0)} tokens allowed)")
            if max(question.ids) >= target.vocab_size:
                raise BadLineError(
                    f"token {max(question.ids)} is not in this target's vocabulary: made by another target?"
                )
        except BadLineError as error:
            handle_bad_line(f"{given.where}: {error}", on_bad_line, report)
            skipped += 1
            continue
        chats.append(chat)
    if not chats:
        raise VSDError("no prompt to answer")
    return chats, skipped


def _batches(
    target: Target, chats: list[_Chat], batch_size: int, room: int, report: Report
) -> Iterator[list[tuple[_Chat, Question]]]:
    """All turns to answer, in batches of like length; answer each batch before taking the next."""
    for begin in range(0, len(chats), batch_size * _WINDOW):
        live = chats[begin : begin + batch_size * _WINDOW]
        while live:
            asked = [(chat, question) for chat in live if (question := chat.question(target)) is not None]
            fits = [(chat, question) for chat, question in asked if len(question.ids) <= room]
            for chat, question in asked:
                if len(question.ids) > room:
                    chat.end()
                    report(f"{chat.where}: ends before '{question.id}', which would be too long")
            for rows in plan_batches([question.ids for _, question in fits], batch_size):
                yield [fits[i] for i in rows]
            live = [chat for chat, _ in fits]


def _record(target: Target, question: Question, answer: Answer, batch: int, sampling: Sampling) -> Record | None:
    """The line for one answer; None if there is no text in it, hence nothing to draft."""
    text = spell(target.tokenizer, answer.ids)
    if not text.strip() or len(answer.ids) < 2:
        return None
    messages = [*question.messages, {"role": "assistant", "content": text}] if question.messages else None
    return {
        "id": question.id,
        **({"messages": messages} if messages else {}),
        "prompt_ids": question.ids,
        "response_ids": answer.ids,
        "finish": answer.finish,
        "temperature": sampling.temperature,
        "batch": batch,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
