"""From a conversation to token ids and the positions that are drafted when it is served.

An answer occupies tokens s … e. Its first token x_s comes out of the target's prefill, so the drafter's first chance is
x_{s+1}; its last token x_e is the end-of-turn token. Supervised are exactly s+1 … e. The positions are read off the
chat template itself, by comparing three renderings of the conversation up to the answer: with a generation
prompt (the prompt that is served), with the answer, and with a placeholder in its place.

- The answer begins where the prompt stops. Text that the template inserts between the prompt and the answer's own text,
  such as an empty thinking block, is context and not supervised.
- The answer ends with the first control token behind its text. The target does not generate the text that the template
  prints behind this token (the newline of ChatML), so it is not supervised either.
- Some templates change the answer, or print a prompt that the rendering with the answer does not begin with: they
  remove thinking from answers and open it in the prompt. Then the answer's own text is put behind the prompt.

One sequence holds all answers of a conversation if the template prints each answer and its prompt unchanged when more
messages follow. A template that rewrites earlier turns yields a sequence of its own for each answer that it rewrites.
"""

import re
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from vsd.data.chat import (
    BadLineError,
    Conversation,
    Message,
    OnBadLine,
    Report,
    handle_bad_line,
    read_conversations,
)
from vsd.data.template import answer_text, control_ids, render, tokenize
from vsd.errors import DataError, TargetError
from vsd.targets.inputs import Inputs

_PLACEHOLDER = "ANSWERTEXT"
_OPEN_BLOCK = re.compile(r"<(\w+)>\s*$")  # at the end of a prompt: <think>


class Example(NamedTuple):
    """One training sequence: drafted[j] is True iff token j is drafted when the conversation is served."""

    inputs: Inputs
    drafted: list[bool]


def load_examples(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_bad_line: OnBadLine = "fatal",
    report: Report | None = None,
) -> list[Example]:
    """Read and encode a whole source; conversations that `encode` refuses are bad lines, too.

    Raises:
        DataError: a bad line, when fatal; no usable conversation.
        TargetError: the tokenizer has no chat template, or is not a fast one.
    """
    examples = []
    for conversation in read_conversations(source, on_bad_line=on_bad_line, report=report):
        try:
            examples += encode(tokenizer, conversation, max_length)
        except BadLineError as error:
            handle_bad_line(f"{conversation.where}: {error}", on_bad_line, report)
    if not examples:
        raise DataError(f"{source} holds no usable conversation")
    return examples


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, max_length: int) -> list[Example]:
    """Token ids and drafted positions of one conversation: one sequence for most chat templates. Nothing is truncated.

    Raises:
        BadLineError: longer than `max_length`, nothing to draft, or an answer that cannot be trained as it is served.
        TargetError: as in `load_examples`.
    """
    if conversation.response_ids:
        examples = [_exact(tokenizer, conversation)]
    else:
        examples = _from_template(tokenizer, conversation.messages)
    longest = max(len(example.inputs.ids) for example in examples)
    if longest > max_length:
        raise BadLineError(f"too long: {longest} tokens, more than the {max_length} allowed")
    draftable = [example for example in examples if any(example.drafted)]
    if not draftable:
        raise BadLineError("nothing to draft: the answer is a single token")
    return draftable


def _exact(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Example:
    prompt, response = conversation.prompt_ids or [], conversation.response_ids or []
    if (largest := max(*prompt, *response)) >= len(tokenizer):
        raise BadLineError(f"token {largest} is not in this target's vocabulary: was it made by another target?")
    if conversation.messages:
        text = answer_text(tokenizer, response)
        if text.strip() != conversation.messages[-1]["content"].strip():
            raise BadLineError(
                "response_ids do not spell the answer: made by another target? Regenerate it for this one"
            )
    drafted = [False] * (len(prompt) + 1) + [True] * (len(response) - 1)
    return Example(Inputs(prompt + response), drafted)


class _Served(NamedTuple):
    """One answer as it is served: text[start:stop] behind `prompt`, with which `text` begins."""

    prompt: str
    text: str
    start: int
    stop: int


def _from_template(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[Example]:
    if not tokenizer.is_fast:
        raise TargetError("this target has no fast tokenizer: only fast ones give the places of tokens in the text")
    sequences: list[list[_Served]] = []  # the answers of a sequence, the last one first: its text is the sequence's
    control = control_ids(tokenizer)
    for i in reversed([i for i, message in enumerate(messages) if message["role"] == "assistant"]):
        answer = _served(tokenizer, messages[:i], messages[i], control)
        holders = [answers for answers in sequences if answers[0].text.startswith(answer.text[: answer.stop])]
        if holders:
            holders[0].append(answer)
        else:
            sequences.append([answer])
    return [_example(tokenizer, answers) for answers in reversed(sequences)]


def _served(tokenizer: PreTrainedTokenizerBase, history: list[Message], message: Message, control: set[int]) -> _Served:
    prompt = render(tokenizer, history, answer_next=True)
    whole = render(tokenizer, [*history, message], answer_next=False)
    tail, end = _end_of_turn(tokenizer, history, control)
    block = _OPEN_BLOCK.search(prompt)
    content = message["content"].strip()
    if block:
        content = content.removeprefix(block[0].strip()).strip()
    body = whole[len(prompt) : len(whole) - len(tail)].rstrip()
    if whole.startswith(prompt) and whole.endswith(tail) and content and body.endswith(content):
        inserted = body.removesuffix(content)
        start = len(prompt) + (len(inserted) if inserted.strip() else 0)
        return _Served(prompt, whole, start, len(whole) - len(tail) + end)
    if block and f"</{block[1]}>" not in content:
        raise BadLineError(
            f"the chat template opens {block[0].strip()} in the prompt and the answer does not close it, so the "
            "target does not answer like this: use `vsd data regenerate`"
        )
    text = prompt + content + tail
    return _Served(prompt, text, len(prompt), len(prompt + content) + end)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, history: list[Message], control: set[int]) -> tuple[str, int]:
    """The template's text behind an answer, and how many characters of it the target generates: one control token."""
    placeholder = {"role": "assistant", "content": _PLACEHOLDER}
    text = render(tokenizer, [*history, placeholder], answer_next=False)
    _, found, tail = text.rpartition(_PLACEHOLDER)
    if not found:
        raise BadLineError("the chat template does not print the text of an answer")
    encoded = tokenizer(tail, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        if token in control:
            return tail, 0 if tail[:first].strip() else last
    return tail, 0


def _example(tokenizer: PreTrainedTokenizerBase, answers: list[_Served]) -> Example:
    """The tokens of one sequence and of the answers in it."""
    encoded = tokenizer(answers[0].text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    drafted = [False] * len(ids)
    for answer in answers:
        prompt = tokenize(tokenizer, answer.prompt)
        if ids[: len(prompt)] != prompt:
            raise BadLineError("the start of an answer fuses with the template into one token: strip its whitespace")
        first = next(j for j in range(len(prompt), len(ids)) if offsets[j][1] > answer.start)
        last = max(j for j in range(first, len(ids)) if offsets[j][0] < answer.stop)
        drafted[first + 1 : last + 1] = [True] * (last - first)
    return Example(Inputs(ids), drafted)
