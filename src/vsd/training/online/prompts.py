"""The prompts of a data source, which online training answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from vsd.data import Conversation, prompt_inputs, read_conversations
from vsd.data.examples import opening
from vsd.data.lines import BadLineError, OnBadLine, Report, handle_bad_line
from vsd.data.pictures import pictures_of
from vsd.errors import DataError
from vsd.targets import Inputs


class Asked(NamedTuple):
    """A prompt, and the opening of its conversation (`vsd.data.Example`)."""

    inputs: Inputs
    opening: int


def load_prompts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    on_bad_line: OnBadLine = "fatal",
    report: Report | None = None,
) -> list[Asked]:
    """One prompt for every user turn whose earlier turns have recorded answers; the first turn always has.

    Args:
        longest: tokens of the longest prompt; a longer one is a bad line.

    Raises:
        DataError: a bad line, when fatal; no usable prompt.
    """
    found: list[Asked] = []
    for conversation in read_conversations(source, on_bad_line=on_bad_line, report=report, need_answer=False):
        try:
            prompts = _fitting(list(_prompts(tokenizer, conversation)), longest)
        except BadLineError as error:
            handle_bad_line(f"{conversation.where}: {error}", on_bad_line, report)
            continue
        first = opening(conversation)
        found += [Asked(prompt, first) for prompt in prompts]
    if not found:
        raise DataError(f"{source} holds no usable prompt")
    return found


def _prompts(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Iterator[Inputs]:
    if conversation.prompt_ids is not None:
        yield Inputs(conversation.prompt_ids)
        return
    messages = conversation.messages
    for i, message in enumerate(messages):
        if message["role"] not in ("user", "tool"):
            continue
        if i > 0 and messages[i - 1]["role"] == "user":
            return  # what was asked before has no recorded answer
        if pictures_of(messages[: i + 1]):
            raise BadLineError("online training answers prompts of text: this one has an image")
        yield prompt_inputs(tokenizer, messages[: i + 1], arguments=conversation.arguments)


def _fitting(prompts: list[Inputs], longest: int) -> list[Inputs]:
    if (most := max((len(prompt.ids) for prompt in prompts), default=0)) > longest:
        raise BadLineError(
            f"too long: a prompt of {most} tokens, more than the {longest} that leave room for an answer"
        )
    return prompts
