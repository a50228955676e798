"""Teachers: whatever answers the prompts of training text. A drafter predicts its target, so a teacher is the target.

There are two: the target in this process (`target_teacher`) and a server that holds it (`server_teacher`). They differ
in the order of their questions, and in nothing that is written: `regenerate` does the rest.
"""

import hashlib
import json
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol

from vsd.data.chat import BadLineError
from vsd.data.generate import Answer
from vsd.data.questions import Chat, Question
from vsd.data.records import GenerationSettings, RecordLog
from vsd.targets.lexicon import Lexicon as TargetInfo


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
        """Everything that decides the answers besides the prompts and the `GenerationSettings`, as JSON values."""

    def answers(
        self, chats: Sequence[Chat], log: RecordLog, settings: GenerationSettings
    ) -> Generator[Batch, None, None]:
        """Ask every question of all chats once; those in `log` are yielded without an answer.

        Whoever iterates writes each batch to `log` and tells its chats what was answered before taking the next one:
        a chat's next question holds the earlier answers.
        """


def digest(value: Any) -> str:
    """Sixteen hex digits of any JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
