"""Conversations that a teacher is answering: each user turn in order, with the earlier answers as history."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vsd.data.chat import Conversation
from vsd.data.lines import BadLineError, OnBadLine, Report, handle_bad_line
from vsd.data.messages import Message
from vsd.data.template import inputs_of, prompt_inputs
from vsd.errors import DataError
from vsd.targets.info import TargetInfo
from vsd.targets.inputs import Inputs


class Question(NamedTuple):
    """One user turn to answer: `messages` end with it, `inputs` is the prompt that the target reads."""

    id: str
    messages: list[Message]
    inputs: Inputs


class Limits(NamedTuple):
    """The target that reads the prompts, the longest prompt in tokens, and who hears of a longer one."""

    info: TargetInfo
    room: int
    report: Report


@dataclass
class Chat:
    """A conversation, and how many of its user turns have been answered.

    Attributes:
        history: the system message, then the answered turns.
        turns: contents of all user turns.
        exact: the prompt's token ids, where the line has no text.
        asked: the number of answered turns.
    """

    id: str
    where: str
    history: list[Message]
    turns: list[Any]
    exact: list[int] | None
    limits: Limits
    asked: int = 0

    def question(self) -> Question | None:
        """The next user turn; None behind the last one."""
        if self.asked == len(self.turns):
            return None
        name = f"{self.id}/{self.asked}"
        if self.exact is not None:
            return Question(name, [], inputs_of(self.exact, [], self.limits.info.images))
        messages = [*self.history, {"role": "user", "content": self.turns[self.asked]}]
        return Question(name, messages, prompt_inputs(self.limits.info.tokenizer, messages, self.limits.info.images))

    def next_question(self) -> Question | None:
        """As `question`; a prompt that is too long, or that the template refuses, is reported and ends the chat."""
        name, reason = f"{self.id}/{self.asked}", "its prompt is too long"
        try:
            question = self.question()
            if question is None or len(question.inputs.ids) <= self.limits.room:
                return question
        except BadLineError as error:
            reason = str(error)
        self.end()
        self.limits.report(f"{self.where}: ends before '{name}': {reason}")
        return None

    def answered(self, answer: str) -> None:
        """Add the current turn and its answer to the history."""
        self.history.append({"role": "user", "content": self.turns[self.asked]})
        self.history.append({"role": "assistant", "content": answer})
        self.asked += 1

    def end(self) -> None:
        """Leave the remaining turns without an answer."""
        self.asked = len(self.turns)


def room_for_prompts(info: TargetInfo, max_length: int | None, max_new_tokens: int) -> int:
    """The longest prompt in tokens; `max_length` (default: the target's context) holds prompt and answer."""
    return (max_length or info.context or sys.maxsize) - max_new_tokens


def open_chats(limits: Limits, conversations: Iterable[Conversation], on_bad_line: OnBadLine) -> tuple[list[Chat], int]:
    """The chats whose first prompt is usable, with ids made unique, and the number of conversations skipped.

    Raises:
        DataError: an unusable prompt, when fatal; no usable prompt at all.
    """
    chats, seen, skipped = list[Chat](), dict[str, int](), 0
    for conversation in conversations:
        count = seen[conversation.id] = seen.get(conversation.id, 0) + 1
        name = conversation.id if count == 1 else f"{conversation.id}~{count}"
        try:
            chats.append(_open(limits, conversation, name))
        except BadLineError as error:
            handle_bad_line(f"{conversation.where}: {error}", on_bad_line, limits.report)
            skipped += 1
    if not chats:
        raise DataError("there is no prompt to answer")
    return chats, skipped


def _open(limits: Limits, conversation: Conversation, name: str) -> Chat:
    turns = [m["content"] for m in conversation.messages if m["role"] == "user"]
    system = [m for m in conversation.messages[:1] if m["role"] == "system"]
    exact = None if turns else conversation.prompt_ids
    chat = Chat(name, conversation.where, system, turns or [""], exact, limits)
    question = chat.question()
    if question is None or len(question.inputs.ids) > limits.room:
        raise BadLineError(
            f"too long: the prompt leaves no room for an answer ({max(limits.room, 0)} tokens are allowed)"
        )
    if (largest := max(question.inputs.ids)) >= limits.info.vocab_size:
        raise BadLineError(f"token {largest} is not in this target's vocabulary: was it made by another target?")
    return chat
