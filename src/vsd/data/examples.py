"""From a conversation to token ids and the positions that are drafted when it is served.

An answer occupies tokens s … e. Its first token x_s comes out of the target's prefill, so the drafter's first chance is
x_{s+1}; its last token x_e is the end-of-turn token. Supervised are exactly s+1 … e. The positions are read off the
chat template itself, by comparing three renderings of the conversation up to the answer: with a generation
prompt (the prompt that is served), with the answer, and with a placeholder in its place.

- The answer begins where the prompt stops. Text that the template inserts between the prompt and the answer's own text,
  such as an empty thinking block, is context and not supervised.
- The answer ends with the first control token behind its text. The target does not generate the text that the template
  prints behind this token (the newline of ChatML), so it is not supervised either.
- An answer with tool calls or `reasoning_content` is what the template prints for them behind the prompt.
- An answer that was cut off at a limit of tokens ends with its text: the target did not generate the control token.
- Some templates change the answer, or print a prompt that the rendering with the answer does not begin with: they
  remove thinking from answers and open it in the prompt. Then the answer's own text is put behind the prompt.

Placeholders of images are never supervised: they stand in prompts alone.

One sequence holds all answers of a conversation if the template prints each answer and its prompt unchanged when more
messages follow. A template that rewrites earlier turns yields a sequence of its own for each answer that it rewrites.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from vsd.data.chat import Conversation, read_conversations
from vsd.data.lines import BadLineError, OnBadLine, Report, handle_bad_line
from vsd.data.messages import Message
from vsd.data.pictures import pictures_of, text_of
from vsd.data.sequences import Example, Examples, drafted_mask
from vsd.data.template import answer_text, check_printed, control_ids, inputs_of, render, tokenize
from vsd.errors import DataError, TargetError
from vsd.targets.images import ImageReader

_PLACEHOLDER = "ANSWERTEXT"
_OPEN_BLOCK = re.compile(r"<(\w+)>\s*$")  # at the end of a prompt: <think>
_FIRST_BLOCK = re.compile(r"\s*(<\w+>)")  # at the beginning of an inserted text


def load_examples(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_bad_line: OnBadLine = "fatal",
    report: Report | None = None,
    *,
    images: ImageReader | None = None,
    download_images: bool = False,
) -> Examples:
    """The training sequences of a whole source, as `encoded` yields them."""
    found = encoded(source, tokenizer, max_length, on_bad_line, report, images=images, download_images=download_images)
    return Examples.of(example for _, examples in found for example in examples)


def encoded(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_bad_line: OnBadLine = "fatal",
    report: Report | None = None,
    *,
    images: ImageReader | None = None,
    download_images: bool = False,
) -> Iterator[tuple[Conversation, list[Example]]]:
    """Read and encode a source; conversations that `encode` refuses are bad lines, too.

    Args:
        images: reads the target's images; None for a target of text.
        download_images: as in `read_conversations`.

    Raises:
        DataError: a bad line, when fatal; no usable conversation.
        TargetError: the tokenizer has no chat template, or is not a fast one.
    """
    usable = 0
    found = read_conversations(source, on_bad_line=on_bad_line, report=report, download_images=download_images)
    for pair in encode_all(found, tokenizer, max_length, on_bad_line, report, images):
        usable += 1
        yield pair
    if not usable:
        raise DataError(f"{source} holds no usable conversation")


def encode_all(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_bad_line: OnBadLine,
    report: Report | None,
    images: ImageReader | None = None,
) -> Iterator[tuple[Conversation, list[Example]]]:
    """Every conversation that `encode` takes, with its sequences.

    Raises:
        DataError: one that it refuses, when fatal.
        TargetError: as in `encoded`.
    """
    for conversation in conversations:
        try:
            examples = encode(tokenizer, conversation, max_length, images)
        except BadLineError as error:
            handle_bad_line(f"{conversation.where}: {error}", on_bad_line, report)
            continue
        yield conversation, examples


def encode(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    max_length: int,
    images: ImageReader | None = None,
) -> list[Example]:
    """Token ids and drafted positions of one conversation: one sequence for most chat templates. Nothing is truncated.

    Raises:
        BadLineError: longer than `max_length`, nothing to draft, or an answer that cannot be trained as it is served.
        TargetError: as in `encoded`.
    """
    if conversation.response_ids:
        examples = [_exact(tokenizer, conversation, images)]
    else:
        examples = _from_template(tokenizer, conversation, images)
    longest = max(len(example.inputs.ids) for example in examples)
    if longest > max_length:
        raise BadLineError(f"too long: {longest} tokens, more than the {max_length} allowed")
    draftable = [example for example in examples if any(example.drafted)]
    if not draftable:
        raise BadLineError("nothing to draft: the answer is a single token")
    first = opening(conversation)
    return [example._replace(opening=first) for example in draftable]


def opening(conversation: Conversation) -> int:
    """`Example.opening`; of a line with token ids alone, of its prompt."""
    before = list(takewhile(lambda message: message["role"] != "assistant", conversation.messages))
    said = [(message["role"], text_of(message["content"])) for message in before]
    text = json.dumps([said or conversation.prompt_ids, [picture.digest for picture in pictures_of(before)]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _exact(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, images: ImageReader | None) -> Example:
    prompt, response = conversation.prompt_ids or [], conversation.response_ids or []
    if (largest := max(*prompt, *response)) >= len(tokenizer):
        raise BadLineError(f"token {largest} is not in this target's vocabulary: was it made by another target?")
    if conversation.messages:
        text = answer_text(tokenizer, response)
        if text.strip() != conversation.messages[-1]["content"].strip():
            raise BadLineError(
                "response_ids do not spell the answer: made by another target? Regenerate it for this one"
            )
    if images is not None and images.placeholder in response:
        raise BadLineError("the answer holds an image token, which no drafter is trained on")
    return Example(
        inputs_of(prompt + response, conversation.messages, images), drafted_mask(len(prompt), len(response))
    )


class _Template(NamedTuple):
    """The chat template of a conversation: its arguments besides messages, the tokens that are markup, and images."""

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any]
    control: set[int]
    images: ImageReader | None

    def render(self, messages: list[Message], *, answer_next: bool = False) -> str:
        return render(self.tokenizer, messages, self.arguments, images=self.images, answer_next=answer_next)


class _Frame(NamedTuple):
    """What the template prints around an answer.

    Attributes:
        prompt: the prompt that is served.
        inserted: text between the prompt and an answer's text, such as an empty thinking block.
        tail: text behind an answer.
        end: how many characters of the tail the target generates: one control token.
    """

    prompt: str
    inserted: str
    tail: str
    end: int


class _Served(NamedTuple):
    """One answer as it is served: text[start:stop] behind `prompt`, with which `text` begins."""

    prompt: str
    text: str
    start: int
    stop: int


def _from_template(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, images: ImageReader | None
) -> list[Example]:
    if not tokenizer.is_fast:
        raise TargetError("this target has no fast tokenizer: only fast ones give the places of tokens in the text")
    messages = conversation.messages
    template = _Template(tokenizer, conversation.arguments, control_ids(tokenizer), images)
    check_printed(tokenizer, messages, conversation.arguments, images)
    sequences: list[list[_Served]] = []  # the answers of a sequence, the last one first: its text is the sequence's
    ends: list[int] = []  # how many messages the text of a sequence prints
    for i in reversed([i for i, message in enumerate(messages) if message["role"] == "assistant"]):
        cut = conversation.cut and i == len(messages) - 1
        answer = _served(template, messages[:i], messages[i], cut)
        holders = [answers for answers in sequences if answers[0].text.startswith(answer.text[: answer.stop])]
        if holders:
            holders[0].append(answer)
        else:
            sequences.append([answer])
            ends.append(i)
    pairs = reversed(list(zip(sequences, ends)))
    return [_example(tokenizer, answers, messages[:end], images) for answers, end in pairs]


def _served(template: _Template, history: list[Message], message: Message, cut: bool) -> _Served:
    """One answer behind its prompt.

    Raises:
        BadLineError: the target does not answer like this behind the prompt that is served.
    """
    frame = _frame(template, history, cut)
    whole = template.render([*history, message])
    if "tool_calls" in message or "reasoning_content" in message:
        return _printed(frame, whole, message, cut)
    prompt, _, tail, end = frame
    block = _OPEN_BLOCK.search(prompt)
    content = message["content"].strip()
    if block:
        content = content.removeprefix(block[0].strip()).strip()
    body = _between(frame, whole)
    as_printed = body is not None and bool(content) and body.rstrip().endswith(content)
    inserted = body.rstrip().removesuffix(content) if body is not None and as_printed else ""
    if block and f"</{block[1]}>" not in content and (not as_printed or f"</{block[1]}>" in inserted):
        raise _not_closed(block)
    opened = _FIRST_BLOCK.match(inserted)  # also by the answer itself: then the target wrote it
    if not as_printed or (opened and content.startswith(opened[1])):
        return _Served(prompt, prompt + content + tail, len(prompt), len(prompt + content) + end)
    start = len(prompt) + (len(inserted) if inserted.strip() else 0)
    return _Served(prompt, whole, start, len(whole) - len(tail) + end)


def _printed(frame: _Frame, whole: str, message: Message, cut: bool) -> _Served:
    """An answer with tool calls or reasoning, as the template prints it; its first text may be inserted."""
    names = [call.get("function", call)["name"] for call in message.get("tool_calls", [])]
    parts = [("tool calls", name) for name in names]
    parts += [(key, message.get(key, "").strip()) for key in ("reasoning_content", "content")]
    body = _between(frame, whole)
    if missing := next((kind for kind, text in parts if text not in (body or whole)), None):
        raise BadLineError(f"the chat template does not print the {missing} of an answer")
    if body is None or (cut and names):
        reason = "a cut answer has tool calls" if cut and names else "the chat template prints them in another place"
        raise BadLineError(f"tool calls or reasoning_content cannot be trained on as they are served: {reason}")
    inserted = frame.inserted if frame.inserted.strip() and body.startswith(frame.inserted) else ""
    if (block := _OPEN_BLOCK.search(frame.prompt)) and f"</{block[1]}>" in inserted:
        raise _not_closed(block)
    return _Served(frame.prompt, whole, len(frame.prompt + inserted), len(whole) - len(frame.tail) + frame.end)


def _not_closed(block: re.Match[str]) -> BadLineError:
    return BadLineError(
        f"the chat template opens {block[0].strip()} in the prompt and the answer does not close it, so the "
        "target does not answer like this: use `vsd data regenerate`"
    )


def _between(frame: _Frame, whole: str) -> str | None:
    """The text between prompt and tail; None if the rendering does not begin and end with them."""
    if not whole.startswith(frame.prompt) or not whole.endswith(frame.tail):
        return None
    return whole[len(frame.prompt) : len(whole) - len(frame.tail)]


def _frame(template: _Template, history: list[Message], cut: bool) -> _Frame:
    """What the template prints around an answer; of a cut one the target generates no end."""
    prompt = template.render(history, answer_next=True)
    text = template.render([*history, {"role": "assistant", "content": _PLACEHOLDER}])
    before, found, tail = text.rpartition(_PLACEHOLDER)
    if not found:
        raise BadLineError("the chat template does not print the text of an answer")
    inserted = before[len(prompt) :] if before.startswith(prompt) else ""
    return _Frame(prompt, inserted, tail, 0 if cut else _end_of_turn(template, tail))


def _end_of_turn(template: _Template, tail: str) -> int:
    """How many characters of the text behind an answer the target generates: one control token."""
    encoded = template.tokenizer(tail, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        if token in template.control:
            return 0 if tail[:first].strip() else int(last)
    return 0


def _example(
    tokenizer: PreTrainedTokenizerBase, answers: list[_Served], history: list[Message], images: ImageReader | None
) -> Example:
    """The tokens of one sequence and of the answers in it; `history` is before the last answer."""
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
    return Example(inputs_of(ids, history, images), drafted)
