"""From a conversation to token ids and the positions that are drafted when it is served.

An answer occupies tokens s … e. Its first token x_s comes out of the target's prefill, so the drafter's
first chance is x_{s+1}; its last token x_e is the end-of-turn token. Supervised are exactly s+1 … e, for
every answer of the conversation. The spans are read off the chat template itself, whatever it is: an answer
starts where the rendering with a generation prompt stops, and ends with the control token behind its text;
what the template prints after that (the newline of ChatML) the target never generates, so it is not drafted
either.
"""

from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError
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
from vsd.errors import DataError, TargetError
from vsd.targets.inputs import Inputs


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
    """Read and encode a whole source; over-long and undraftable conversations are bad lines too."""
    examples = []
    for conversation in read_conversations(source, on_bad_line=on_bad_line, report=report):
        try:
            examples.append(encode(tokenizer, conversation, max_length))
        except BadLineError as error:
            handle_bad_line(f"{conversation.where}: {error}", on_bad_line, report)
    if not examples:
        raise DataError(f"{source} holds no usable conversation")
    return examples


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, max_length: int) -> Example:
    """Token ids and drafted positions of one conversation. Nothing is truncated.

    Raises:
        BadLineError: longer than `max_length`, nothing to draft, or a template that rewrites what was said.
    """
    if conversation.response_ids:
        ids, spans = _exact(tokenizer, conversation)
    else:
        ids, spans = _from_template(tokenizer, conversation.messages)
    if len(ids) > max_length:
        raise BadLineError(f"too long: {len(ids)} tokens, more than the {max_length} allowed")
    drafted = [False] * len(ids)
    for start, end in spans:
        drafted[start + 1 : end + 1] = [True] * (end - start)
    if not any(drafted):
        raise BadLineError("nothing to draft: the answer is a single token")
    return Example(Inputs(ids), drafted)


def prompt_inputs(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> Inputs:
    """The prompt that is served for these messages: everything up to the first token of the target's answer."""
    return Inputs(tokenize(tokenizer, render(tokenizer, messages, answer_next=True)))


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of rendered text, which contains its control tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, answer_next: bool) -> str:
    """The chat template's text, with or without the header of the next answer."""
    if not tokenizer.chat_template:
        raise TargetError("the target's tokenizer has no chat template: use the instruction-tuned version of the model")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
        assert isinstance(text, str)
        return text
    except TemplateError as error:
        raise BadLineError(f"the chat template refuses it: {error}") from error


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are markup, not text (some tokenizers add runs of blanks too: those are text)."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return added | set(tokenizer.all_special_ids)


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of an answer, without markup and otherwise as the tokens have it."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


Spans = list[tuple[int, int]]  # first and last token of every answer


def _exact(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> tuple[list[int], Spans]:
    prompt, response = conversation.prompt_ids or [], conversation.response_ids or []
    if max(*prompt, *response) >= len(tokenizer):
        raise BadLineError(
            f"token {max(*prompt, *response)} is not in this target's vocabulary: made by another target?"
        )
    if conversation.messages:
        said = answer_text(tokenizer, response)
        if said.strip() != conversation.messages[-1]["content"].strip():
            raise BadLineError(
                "response_ids do not spell the answer: made by another target? Regenerate it for this one"
            )
    return prompt + response, [(len(prompt), len(prompt) + len(response) - 1)]


def _from_template(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[list[int], Spans]:
    if not tokenizer.is_fast:
        raise TargetError("this target has no fast tokenizer: only fast ones say where in the text a token stands")
    text = render(tokenizer, messages, answer_next=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    control = control_ids(tokenizer)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin, content_end, limit = _locate(tokenizer, messages, i, text)
        start = next((j for j, (_, stop) in enumerate(offsets) if stop > begin), len(ids))
        if ids[:start] != tokenize(tokenizer, text[:begin]):
            raise BadLineError(
                f"the start of answer {i + 1} fuses with the template into one token: strip its whitespace"
            )
        end = max((j for j, (first, _) in enumerate(offsets) if first < content_end), default=-1)
        after = next((j for j in range(end + 1, len(ids)) if ids[j] in control), None)
        if after is not None and offsets[after][1] <= limit and not text[content_end : offsets[after][0]].strip():
            end = after
        spans.append((start, end))
    return ids, spans


def _locate(tokenizer: PreTrainedTokenizerBase, messages: list[Message], i: int, text: str) -> tuple[int, int, int]:
    """Where in `text` answer i begins, where its words end, and where everything of its turn ends."""
    before = render(tokenizer, messages[:i], answer_next=True)
    content = messages[i]["content"].strip()
    found = text.find(content, len(before))
    if not text.startswith(before) or found < 0:
        raise BadLineError(
            "the chat template rewrites earlier turns, so drafted positions cannot be told from the text: "
            "use `vsd data regenerate`, whose records carry the tokens"
        )
    own = render(tokenizer, messages[: i + 1], answer_next=False)
    return len(before), found + len(content), _shared(own, text)


def _shared(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))
