"""The target's chat template and tokenizer: messages to text, text to tokens and back."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from vsd.data.lines import BadLineError
from vsd.data.messages import Message
from vsd.data.pictures import pictures_of
from vsd.errors import DataError, TargetError
from vsd.targets.images import ImageReader, Picture
from vsd.targets.inputs import Inputs

_OTHER = "OTHERTEXT"
_PRINTED_PART = "[{'type': '"  # in the text of a template that expects plain text and prints the list of parts


def prompt_inputs(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    images: ImageReader | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Inputs:
    """The prompt that is served for these messages: everything up to the first token of the target's answer.

    Args:
        images: reads the target's images; None for a target of text.
        arguments: of the chat template besides messages.

    Raises:
        BadLineError: the chat template fails, or does not print the last user message or an image; an image cannot be
            decoded, or the target reads none.
        TargetError: there is no chat template.
    """
    ids = tokenize(tokenizer, render(tokenizer, messages, arguments, images=images, answer_next=True))
    return inputs_of(ids, messages, images)


def inputs_of(ids: list[int], messages: list[Message], images: ImageReader | None) -> Inputs:
    """The inputs of tokens with the images of messages, whose placeholders they hold.

    Raises:
        BadLineError: they do not, or an image cannot be decoded.
    """
    if images is None:
        return Inputs(ids)
    try:
        return images.inputs(ids, pictures_of(messages))
    except DataError as error:
        raise BadLineError(str(error)) from error


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of rendered text, which contains its control tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    arguments: Mapping[str, Any] | None = None,
    *,
    images: ImageReader | None = None,
    answer_next: bool,
) -> str:
    """The chat template's text, with or without the header of the next answer, with placeholders of the images.

    Args:
        arguments: what the template is given besides messages, such as tools.
        images: as in `prompt_inputs`.

    Templates of multimodal targets may read a message as a list of parts and print nothing for plain text. So a
    template that does not print the last user message is given parts instead; where there are images, parts come first.

    Raises:
        BadLineError, TargetError: as `prompt_inputs`.
    """
    if not tokenizer.chat_template:
        raise TargetError("the target's tokenizer has no chat template: use the instruction-tuned version of the model")
    pictures = pictures_of(messages)
    if pictures and images is None:
        raise BadLineError("there are images, and this target reads none")
    question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    texts = [part["text"].strip() for part in _parts(question) if part["type"] == "text"]
    failure = BadLineError("the chat template does not print the text of the user's message")
    forms = (True, [{**m, "content": _plain(m["content"])} for m in messages]), (False, _in_parts(messages))
    for as_given, form in reversed(forms) if pictures else forms:
        try:
            text = _apply(tokenizer, form, arguments or {}, answer_next)
        except BadLineError as error:
            failure = error if as_given else failure
            continue
        if all(part in text for part in texts) and ((as_given and not pictures) or _PRINTED_PART not in text):
            return text if images is None else _expanded(text, pictures, images)
    raise failure


def _expanded(text: str, pictures: list[Picture], images: ImageReader) -> str:
    try:
        return images.expand(text, pictures)
    except DataError as error:
        raise BadLineError(str(error)) from error


def check_printed(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    arguments: Mapping[str, Any],
    images: ImageReader | None = None,
) -> None:
    """Refuse what the template leaves out: the answer was written with it in view.

    Raises:
        BadLineError: the template does not print a system, developer or tool message, or the tools.
        TargetError: there is no chat template.
    """
    others = [i for i, message in enumerate(messages) if message["role"] in ("system", "developer", "tool")]
    if not others and "tools" not in arguments:
        return
    text = render(tokenizer, messages, arguments, images=images, answer_next=False)
    for i in others:
        message = messages[i]
        other = {**message, "content": message["content"] + _OTHER}
        changed = [*messages[:i], other, *messages[i + 1 :]]
        if render(tokenizer, changed, arguments, images=images, answer_next=False) == text:
            raise BadLineError(f"the chat template does not print the {message['role']} message (message {i + 1})")
    if "tools" in arguments:
        without = {name: value for name, value in arguments.items() if name != "tools"}
        if render(tokenizer, messages, without, images=images, answer_next=False) == text:
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
    return [{**message, "content": _parts(_plain(message["content"]))} for message in messages]


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _plain(content: Any) -> Any:
    """A content whose images are places alone, as templates read them."""
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image" else part for part in content]


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
