"""Conversations that a teacher is answering: each user turn in order, with the earlier answers as history."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from vsd.data.chat import Conversation
from vsd.data.lines import BadLineError, OnBadLine, Report, handle_bad_line
from vsd.data.messages import Message
from vsd.data.template import inputs_of, prompt_inputs
from vsd.targets.info import TargetInfo
from vsd.targets.inputs import Inputs


class Question(NamedTuple):
    """One user turn to answer: `messages` end with it, `inputs` is the prompt that the target reads."""

    id: str
    messages: list[Message]
    inputs: Inputs


class Limits(NamedTuple):
    """The target that reads the prompts, the longest prompt in tokens, and what happens with one that is not asked."""

    info: TargetInfo
    room: int
    on_bad_line: OnBadLine
    report: Report


@dataclass
class Tally:
    """How far a run is.

    Attributes:
        turns: user turns of the conversations that were begun.
        asked, answers: turns whose prompt was usable, and turns with an answer.
        done: conversations that need no further answer.
    """

    turns: int = 0
    asked: int = 0
    answers: int = 0
    done: int = 0


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
    tally: Tally
    asked: int = 0

    @property
    def done(self) -> bool:
        """Whether no turn is left."""
        return self.asked == len(self.turns)

    @property
    def name(self) -> str:
        """The id of the next turn."""
        return f"{self.id}/{self.asked}"

    def prompt(self) -> list[Any]:
        """Messages that end with the next turn, or the token ids of the prompt."""
        return self.exact or [*self.history, {"role": "user", "content": self.turns[self.asked]}]

    def next_question(self) -> Question | None:
        """The next user turn; None behind the last one. A prompt that cannot be asked ends the chat.

        Raises:
            DataError: the first prompt cannot be asked, when bad lines are fatal.
        """
        if self.done:
            return None
        try:
            question = self._question()
        except BadLineError as error:
            self._refuse(str(error))
            return None
        self.tally.asked += 1
        return question

    def answered(self, answer: str) -> None:
        """Add the current turn and its answer to the history."""
        self.history.append({"role": "user", "content": self.turns[self.asked]})
        self.history.append({"role": "assistant", "content": answer})
        self.asked += 1
        self.tally.answers += 1
        self.tally.done += self.done

    def end(self) -> None:
        """Leave the remaining turns without an answer."""
        self.asked = len(self.turns)
        self.tally.done += 1

    def _question(self) -> Question:
        info, prompt = self.limits.info, self.prompt()
        if self.exact is not None:
            question = Question(self.name, [], inputs_of(prompt, [], info.images))
        else:
            question = Question(self.name, prompt, prompt_inputs(info.tokenizer, prompt, info.images))
        _check_prompt(question.inputs.ids, self.limits)
        return question

    def _refuse(self, reason: str) -> None:
        name, first = self.name, self.asked == 0
        self.end()
        if first:
            handle_bad_line(f"{self.where}: {reason}", self.limits.on_bad_line, self.limits.report)
        else:
            self.limits.report(f"{self.where}: ends before '{name}': {reason}")


def room_for_prompts(info: TargetInfo, max_length: int | None, max_new_tokens: int) -> int:
    """The longest prompt in tokens; `max_length` (default: the target's context) holds prompt and answer."""
    return (max_length or info.context or sys.maxsize) - max_new_tokens


def open_chats(limits: Limits, conversations: Iterable[Conversation], tally: Tally) -> Iterator[Chat]:
    """The chats of conversations, one at a time, with ids made unique."""
    seen = dict[str, int]()
    for conversation in conversations:
        turns = [m["content"] for m in conversation.messages if m["role"] == "user"]
        system = [m for m in conversation.messages[:1] if m["role"] == "system"]
        exact, turns = (None, turns) if turns else (conversation.prompt_ids, [""])
        tally.turns += len(turns)
        yield Chat(_unique(seen, conversation.id), conversation.where, system, turns, exact, limits, tally)


def _unique(seen: dict[str, int], id: str) -> str:
    """The id if it is new, else with its number behind it."""
    count = seen[id] = seen.get(id, 0) + 1
    return id if count == 1 else _unique(seen, f"{id}~{count}")  # which may be the id of another line


def _check_prompt(ids: list[int], limits: Limits) -> None:
    """Raise BadLineError for a prompt that the target cannot answer."""
    if len(ids) > limits.room:
        raise BadLineError(
            f"too long: the prompt leaves no room for an answer ({max(limits.room, 0)} tokens are allowed)"
        )
    if (largest := max(ids)) >= limits.info.vocab_size:
        raise BadLineError(f"token {largest} is not in this target's vocabulary: was it made by another target?")
