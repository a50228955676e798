"""Conversations while they are being answered: each user turn in order, with the earlier answers as history."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from vsd.data.chat import BadLineError, Conversation, Message, OnBadLine, Report, handle_bad_line
from vsd.data.generate import Answer
from vsd.data.records import Record
from vsd.data.template import prompt_ids, spell
from vsd.errors import VSDError
from vsd.targets.info import TargetInfo


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


class Summary(NamedTuple):
    """Answers in the file, conversations or turns that are not, and the answer tokens in the file."""

    written: int
    skipped: int
    tokens: int


@dataclass
class Chat:
    """A conversation, and how far it has been answered.

    Attributes:
        history: the system message, then answered turns.
        turns: all user turns.
        exact: the prompt's tokens, where the line has no text.
        asked: how many turns have been answered.
    """

    id: str
    where: str
    history: list[Message]
    turns: list[str]
    exact: list[int] | None
    asked: int = 0

    def question(self, info: TargetInfo) -> Question | None:
        """The next user turn, if there is one."""
        if self.asked == len(self.turns):
            return None
        messages = [*self.history, {"role": "user", "content": self.turns[self.asked]}]
        if self.exact is not None:
            return Question(f"{self.id}/{self.asked}", [], self.exact)
        return Question(f"{self.id}/{self.asked}", messages, prompt_ids(info.tokenizer, messages))

    def question_within(self, info: TargetInfo, room: int, report: Report) -> Question | None:
        """The next user turn; one longer than `room` tokens ends the conversation, and is reported."""
        question = self.question(info)
        if question is None or len(question.ids) <= room:
            return question
        self.end()
        report(f"{self.where}: ends before '{question.id}', which would be too long")
        return None

    def answered(self, answer: str) -> None:
        """Take the answer to the question asked last into the history."""
        self.history.append({"role": "user", "content": self.turns[self.asked]})
        self.history.append({"role": "assistant", "content": answer})
        self.asked += 1

    def end(self) -> None:
        """Ask no more."""
        self.asked = len(self.turns)


def room_for_prompts(info: TargetInfo, max_length: int | None, max_new_tokens: int) -> int:
    """Tokens a prompt may have; `max_length` (default: the target's context) is for prompt and answer together."""
    return (max_length or info.context or sys.maxsize) - max_new_tokens


def open_chats(
    info: TargetInfo,
    conversations: Iterable[Conversation],
    room: int,
    on_bad_line: OnBadLine,
    report: Report | None,
) -> tuple[list[Chat], int]:
    """Chats whose first prompt fits into `room` tokens, with ids made unique, and how many there are not."""
    chats, seen, skipped = [], dict[str, int](), 0
    for given in conversations:
        seen[given.id] = seen.get(given.id, 0) + 1
        name = given.id if seen[given.id] == 1 else f"{given.id}~{seen[given.id]}"
        turns = [m["content"] for m in given.messages if m["role"] == "user"]
        system = [m for m in given.messages[:1] if m["role"] == "system"]
        exact = None if turns else given.prompt_ids
        chat = Chat(name, given.where, system, turns or [""], exact)
        try:
            question = chat.question(info)
            if question is None or len(question.ids) > room:
                raise BadLineError(f"too long: the prompt leaves no room for an answer ({max(room, 0)} tokens allowed)")
            if max(question.ids) >= info.vocab_size:
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


def record_of(info: TargetInfo, question: Question, answer: Answer, batch: int, sampling: Sampling) -> Record | None:
    """The line for one answer; None if there is no text in it, hence nothing to draft."""
    text = spell(info.tokenizer, answer.ids)
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
