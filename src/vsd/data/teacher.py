"""The protocol of teachers. A teacher answers the prompts of training text; a drafter must learn from its own target.

There are two: the target in this process (`target_teacher`) and a server that holds the target (`server_teacher`). A
teacher decides in which order questions are asked and which of them together. Everything else is `regenerate`.
"""

import hashlib
import json
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple, Protocol

from vsd.data.generate import Answer
from vsd.data.lines import BadLineError
from vsd.data.questions import Chat, Question
from vsd.data.records import GenerationSettings, RecordLog
from vsd.targets.info import TargetInfo


class Answered(NamedTuple):
    """One question of a chat, with its answer; a BadLineError if it was refused; None if the file has it already."""

    chat: Chat
    question: Question
    answer: Answer | BadLineError | None


class Batch(NamedTuple):
    """Answers that are written together, and the number in their records."""

    number: int
    answered: list[Answered]


class Teacher(Protocol):
    """Answers questions."""

    @property
    def info(self) -> TargetInfo:
        """The target's tokenizer, vocabulary, context and end tokens."""

    @property
    def settings(self) -> dict[str, Any]:
        """The teacher's own settings, as JSON values: a file that was begun with others is not resumed."""

    def answers(
        self, chats: Iterable[Chat], log: RecordLog, settings: GenerationSettings
    ) -> Generator[Batch, None, None]:
        """Ask all questions of all chats but those that `log` holds.

        Chats are taken when they can be asked: there may be millions. The caller writes each batch to `log` and adds
        its answers to the chats before it takes the next batch, because a chat's next question contains the earlier
        answers; those in `log` are added by the caller where they are yielded without an answer, else by the teacher.
        """


def digest(value: Any) -> str:
    """Sixteen hex digits of any JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
