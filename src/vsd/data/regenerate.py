"""Replace every answer of a data set by the target's own: a drafter must learn what its target says.

Each user turn is answered in order, with the target's earlier answers as history, and every answer becomes
one record that carries its exact tokens. The work is cut into numbered batches that depend only on the
prompts and the settings, so a killed run continues at the batch it was in, and ends with the file that a
straight run would have written.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vsd.data.chat import LOG, Conversation, OnBadLine, Report
from vsd.data.generate import derive_seed, generate_batch, plan_batches
from vsd.data.questions import Chat, Question, Sampling, Summary, open_chats, record_of, room_for_prompts
from vsd.data.records import Entry, RecordLog, progress_bar
from vsd.targets.info import TargetInfo
from vsd.targets.target import Target

_WINDOW = 16  # batches' worth of conversations that are sorted by length together


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
    info = target
    room = room_for_prompts(info, max_length, max_new_tokens)
    chats, skipped = open_chats(info, conversations, room, on_bad_line, report)
    settings = {
        "kind": "regenerate",
        **describe(target),
        "prompts": digest([[c.id, c.history, c.turns, c.exact] for c in chats]),
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
        for number, batch in enumerate(_batches(info, chats, batch_size, room, report)):
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
    info = target
    made = [record_of(info, q, a, number, sampling) for q, a in zip(questions, answers, strict=True)]
    log.append([record for record in made if record is not None and record["id"] not in log.entries])
    return [
        log.entries.get(q.id) or (None if record is None else Entry.of(record))
        for q, record in zip(questions, made, strict=True)
    ]


def describe(target: Target) -> dict[str, str]:
    """What of the target decides the records: weights and chat template."""
    return {"target": target.fingerprint(), "chat_template": digest(target.tokenizer.chat_template)}


def _batches(
    info: TargetInfo, chats: list[Chat], batch_size: int, room: int, report: Report
) -> Iterator[list[tuple[Chat, Question]]]:
    """All turns to answer, in batches of like length; answer each batch before taking the next."""
    for begin in range(0, len(chats), batch_size * _WINDOW):
        live = chats[begin : begin + batch_size * _WINDOW]
        while live:
            asked = [(chat, chat.question_within(info, room, report)) for chat in live]
            fits = [(chat, question) for chat, question in asked if question is not None]
            for rows in plan_batches([question.ids for _, question in fits], batch_size):
                yield [fits[i] for i in rows]
            live = [chat for chat, _ in fits]


def digest(value: Any) -> str:
    """Sixteen hex digits of any JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
