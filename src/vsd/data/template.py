"""The target's chat template and tokenizer: messages to text, text to tokens and back."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from vsd.data.lines import BadLineError
from vsd.data.messages import Message
from vsd.errors import TargetError
from vsd.targets.inputs import Inputs

_OTHER = "OTHERTEXT"
_PRINTED_PART = "[{'type': 'text'"  # in the text of a template that expects plain text and prints the list of parts


def prompt_inputs(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], arguments: Mapping[str, Any] | None = None
) -> Inputs:
    """The prompt that is served for these messages: everything up to the first token of the target's answer.

    Args:
        arguments: of the chat template besides messages.

    Raises:
        BadLineError: the chat template fails, or does not print the last user message.
        TargetError: there is no chat template.
    """
    return Inputs(tokenize(tokenizer, render(tokenizer, messages, arguments, answer_next=True)))


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of rendered text, which contains its control tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    arguments: Mapping[str, Any] | None = None,
    *,
    answer_next: bool,
) -> str:
    """The chat template's text, with or without the header of the next answer.

    Args:
        arguments: what the template is given besides messages, such as tools.

    Templates of multimodal targets may read a message as a list of parts and print nothing for plain text. So a
    template that does not print the last user message is given parts instead.

    Raises:
        BadLineError, TargetError: as `prompt_inputs`.
    """
    if not tokenizer.chat_template:
        raise TargetError("the target's tokenizer has no chat template: use the instruction-tuned version of the model")
    question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "").strip()
    failure = BadLineError("the chat template does not print the text of the user's message")
    for as_given, form in ((True, messages), (False, _in_parts(messages))):
        try:
            text = _apply(tokenizer, form, arguments or {}, answer_next)
        except BadLineError as error:
            failure = error if as_given else failure
            continue
        if question in text and (as_given or _PRINTED_PART not in text):
            return text
    raise failure


def check_printed(tokenizer: PreTrainedTokenizerBase, messages: list[Message], arguments: Mapping[str, Any]) -> None:
    """Refuse what the template leaves out: the answer was written with it in view.

    Raises:
        BadLineError: the template does not print a system, developer or tool message, or the tools.
        TargetError: there is no chat template.
    """
    text = render(tokenizer, messages, arguments, answer_next=False)
    for i, message in enumerate(messages):
        if message["role"] in ("system", "developer", "tool"):
            other = {**message, "content": message["content"] + _OTHER}
            changed = [*messages[:i], other, *messages[i + 1 :]]
            if render(tokenizer, changed, arguments, answer_next=False) == text:
                raise BadLineError(f"the chat template does not print the {message['role']} message (message {i + 1})")
    if "tools" in arguments:
        without = {name: value for name, value in arguments.items() if name != "tools"}
        if render(tokenizer, messages, without, answer_next=False) == text:
            raise BadLineError("the chat template does not print the tools")


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are markup, not text (some tokenizers add runs of blanks too: those are text)."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return added | set(tokenizer.all_special_ids)


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of an answer, without markup and otherwise as the tokens have it."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _in_parts(messages: list[Message]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[Any], arguments: Mapping[str, Any], answer_next: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next, **arguments)
    except Exception as error:  # a template is a program: it may raise its own errors, TypeError, ZeroDivisionError, …
        reason = " ".join(str(error).split()) or "no message"
        raise BadLineError(f"the chat template refuses it: {reason} ({type(error).__name__})") from error
    assert isinstance(text, str)
    return text
