"""Replaces the answers of conversations with a teacher's: a drafter must be trained on text that its target wrote.

Each user turn is answered in order, with the teacher's earlier answers as history. Every answer becomes one record
with its exact tokens, and is on disk before the conversation's next turn is asked. The same call resumes a run that was
killed. Conversations are read while others are answered, and forgotten when they are done: of each remains its
id, and of each answer its place in the file.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from vsd.data.chat import Conversation
from vsd.data.generate import Answer
from vsd.data.lines import LOG, BadLineError, OnBadLine, Report, handle_bad_line
from vsd.data.progress import ConversationBar
from vsd.data.questions import Limits, Question, Tally, open_chats, room_for_prompts
from vsd.data.records import Entry, GenerationSettings, RecordLog, Summary, record_of
from vsd.data.teacher import Answered, Teacher
from vsd.errors import DataError
from vsd.targets.info import TargetInfo


def regenerate(
    teacher: Teacher,
    conversations: Iterable[Conversation],
    out: Path,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    max_length: int | None = None,
    on_bad_line: OnBadLine = "fatal",
    report: Report | None = None,
    progress: bool = True,
    count: Callable[[], int | None] | None = None,
) -> Summary:
    """Answer every user turn of `conversations`; `out` is resumed if it exists.

    Args:
        teacher: `TargetTeacher` or `ServerTeacher`.
        max_length: the longest prompt and answer together, in tokens; default the target's context. A conversation
            whose first prompt is longer is a bad line; one whose later prompt is longer ends there.
        on_bad_line: "fatal" raises, "skip" reports; a conversation that a server refuses is a bad line, too.
        report: called with one line for every skipped turn or conversation; default: a logged warning.
        count: the number of conversations, for the progress bar; called once, in a thread of its own.

    Raises:
        DataError: a bad line, when fatal; no prompt; a damaged `out`.
        MismatchError: `out` was begun with other settings.
        VSDError: of the teacher.
    """
    room = room_for_prompts(teacher.info, max_length, max_new_tokens)
    limits, tally = Limits(teacher.info, room, on_bad_line, report or LOG.warning), Tally()
    settings = GenerationSettings(max_new_tokens, temperature, seed)
    header = {**teacher.settings, **settings._asdict(), "max_length": max_length}
    with RecordLog(Path(out), header) as log, ConversationBar(tally, log, count, enabled=progress) as bar:
        chats = open_chats(limits, _shown(conversations, bar), tally)
        with closing(teacher.answers(chats, log, settings)) as batches:
            for number, answered in batches:
                questions, answers = [one.question for one in answered], [one.answer for one in answered]
                entries = write_answers(log, teacher.info, number, questions, answers, settings)
                for one, entry in zip(answered, entries, strict=True):
                    _continue_chat(one, entry, on_bad_line, limits.report)
                bar.show()
        if not (tally.asked or tally.answers):
            raise DataError("there is no prompt to answer")
        return Summary(len(log), tally.turns - tally.answers, log.tokens, log.cut)


def _shown(conversations: Iterable[Conversation], bar: ConversationBar) -> Iterator[Conversation]:
    """The conversations; the progress is shown whenever one is taken."""
    for conversation in conversations:
        bar.show()
        yield conversation


def write_answers(
    log: RecordLog,
    info: TargetInfo,
    number: int,
    questions: Sequence[Question],
    answers: Sequence[Answer | BadLineError | None],
    settings: GenerationSettings,
) -> list[Entry | None]:
    """Write the answers of a batch that the file lacks. The entry of every question; None for an empty answer."""
    records = [
        record_of(info, question, answer, number, settings)
        for question, answer in zip(questions, answers, strict=True)
        if isinstance(answer, Answer) and question.id not in log
    ]
    log.append([record for record in records if record is not None])
    return [log.find(question.id, question.messages or question.inputs.ids) for question in questions]


def _continue_chat(one: Answered, entry: Entry | None, on_bad_line: OnBadLine, report: Report) -> None:
    """Add the answer to the chat's history; a chat without one ends, and is reported."""
    if entry is not None:
        one.chat.answered(entry.answer)
        return
    one.chat.end()
    if isinstance(one.answer, BadLineError):
        handle_bad_line(f"{one.chat.where}: {one.answer}", on_bad_line, report)
    else:
        report(f"{one.chat.where}: the answer to '{one.question.id}' is empty")
