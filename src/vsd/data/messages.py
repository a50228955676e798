"""The messages of a row, in the form that chat templates take, from any of the row formats.

A message is {"role", "content"} with a text as content, or a list of texts and images (`vsd.data.pictures`), and where
the row has them "tool_calls" (of an answer), "reasoning_content" (of an answer) and "tool_call_id" and "name" (of a
tool's message). Two things are written as
servers write them before they render a template: an answer of tool calls alone has the content "", and the arguments of
a tool call are an object, not its JSON text.
"""

import json
from pathlib import Path
from typing import Any

from vsd.data.lines import BadLineError
from vsd.data.pictures import Album

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_BEFORE = {"assistant": ("user", "tool"), "tool": ("assistant", "tool")}  # roles of the message before
_OWN = {  # arguments of `apply_chat_template` itself
    *("conversation", "tools", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "tokenizer_kwargs",
}
REASONING = ("reasoning_content", "reasoning")


def messages_of(
    row: dict[str, Any], *, exact: bool, need_answer: bool, folder: Path = Path(), download: bool = False
) -> list[Message]:
    """The messages of a row; none for a row with token ids alone (`exact`).

    Args:
        folder, download: as in `Album`.
        need_answer: the order of an engine, with an answer at the end; else at most one system message, then user and
            assistant alternately.

    Raises:
        BadLineError: a message that cannot be used, or a wrong order.
    """
    album = Album(row, folder, download=download)
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            messages = [*_system(row), *(_message(message, album) for message in _list(row, key))]
            (_check_order if need_answer else _check_alternation)(messages)
            return _placed(messages, album)
    if row.get("turns") is not None:
        return _placed([*_system(row), *(_question(turn, album) for turn in _list(row, "turns"))], album)
    if row.get("prompt") is not None:
        return _placed([*_system(row), _question(row["prompt"], album)], album)
    if exact:
        return []
    found = ", ".join(sorted(map(str, row))) or "nothing"
    raise BadLineError(f"no messages: expected messages, conversations, turns, prompt or prompt_ids, found {found}")


def template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """What a request gives the chat template besides messages: `tools` and the entries of `chat_template_kwargs`.

    Raises:
        BadLineError: one of them is malformed.
    """
    tools, arguments = _decoded(row.get("tools") or None), row.get("chat_template_kwargs") or {}
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadLineError("tools must be a list of objects")
    if not isinstance(arguments, dict):
        raise BadLineError('chat_template_kwargs must be an object, such as {"enable_thinking": false}')
    if taken := _OWN & set(arguments):
        raise BadLineError(f"chat_template_kwargs cannot set {min(taken)}")
    given = {**({"tools": tools} if tools else {}), **arguments}
    _check_unicode(json.dumps(given, ensure_ascii=False))
    return given


def _list(row: dict[str, Any], key: str) -> list[Any]:
    items = row[key]
    if not isinstance(items, list) or not items:
        raise BadLineError(f"{key} must be a list that is not empty")
    return items


def _placed(messages: list[Message], album: Album) -> list[Message]:
    """Messages with listed images that have no place in a text before the first question."""
    if rest := album.rest():
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None or not isinstance(messages[first]["content"], str):
            raise BadLineError("images beside the messages that have no place in them")
        text = {"type": "text", "text": messages[first]["content"]}
        messages[first] = {**messages[first], "content": [*rest, text]}
    return messages


def _question(content: Any, album: Album, *, may_be_empty: bool = False) -> Message:
    parts = album.parts(content)
    for part in parts or ():
        _check_unicode(part.get("text", ""))
    return {"role": "user", "content": parts or (_content(content) if may_be_empty else _filled(content))}


def _system(row: dict[str, Any]) -> list[Message]:
    """The system message that some rows have beside their turns."""
    return [{"role": "system", "content": _filled(row["system"])}] if row.get("system") else []


def _message(message: Any, album: Album) -> Message:
    message = message if isinstance(message, dict) else {}
    role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
    calls = bool(message.get("tool_calls"))
    if role_key not in message or (content_key not in message and not calls):
        raise BadLineError('a message needs "role" and "content", or "from" and "value"')
    role = message[role_key]
    role = _NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadLineError(f"role {role!r} is not {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    content = message.get(content_key)
    if role == "user":
        return {**_question(content, album, may_be_empty=calls), **_extras(message, role)}
    may_be_empty = calls or role == "tool"
    text = _content(content) if may_be_empty else _filled(content)
    return {"role": role, "content": text, **_extras(message, role)}


def _extras(message: dict[str, Any], role: str) -> Message:
    """Tool calls and reasoning of an answer; the origin of a tool's message."""
    if role == "tool":
        return {key: message[key] for key in ("tool_call_id", "name") if isinstance(message.get(key), str)}
    extras: Message = {}
    if message.get("tool_calls"):
        if role != "assistant":
            raise BadLineError(f"tool_calls in a message of role {role}")
        extras["tool_calls"] = [_call(call) for call in _list(message, "tool_calls")]
    reasoning = next((message[key] for key in REASONING if message.get(key)), None)
    if reasoning is not None and role == "assistant":
        extras["reasoning_content"] = _filled(reasoning)
    return extras


def _call(call: Any) -> dict[str, Any]:
    """A tool call, its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadLineError("a tool call needs a name")
    function = {**function, "arguments": _decoded(function.get("arguments") or {})}
    if not isinstance(function["arguments"], dict):
        raise BadLineError("the arguments of a tool call must be an object")
    _check_unicode(json.dumps(function, ensure_ascii=False))
    return {**call, "function": function} if "function" in call else function


def _decoded(value: Any) -> Any:
    """A value that may be written as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"tools or arguments of a tool call are not JSON ({error})") from error


def _filled(content: Any) -> str:
    """The text of a content that must not be empty."""
    text = _content(content)
    if not text.strip():
        raise BadLineError("a message is empty")
    return text


def _content(content: Any) -> str:
    """A text, or a list with one text part; nothing is the empty text."""
    text = _only_part(content) if isinstance(content, list) and content else content
    if text is None:
        return ""
    if not isinstance(text, str):
        raise BadLineError(f"the content of a message must be text, found {type(text).__name__}")
    _check_unicode(text)
    return text


def _only_part(parts: list[Any]) -> Any:
    """The text of a list with one part. Servers join several parts in different ways, so these are refused."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise BadLineError(f"a message has a part of type {kind!r}: only text can be trained on, and users' images")
    if len(parts) > 1:
        raise BadLineError("a message has several text parts, which servers join in different ways: write one text")
    return parts[0].get("text")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadLineError("a message holds half a surrogate pair: not valid Unicode") from error


def _check_order(messages: list[Message]) -> None:
    """An answer follows a user or tool message, a tool's message an answer; the rest is left to the chat template."""
    roles = [message["role"] for message in messages]
    for i, (role, before) in enumerate(zip(roles, ["nothing", *roles])):
        if role in _BEFORE and before not in _BEFORE[role]:
            raise BadLineError(f"wrong role order: message {i + 1} is {role}, after {before}")


def _check_alternation(messages: list[Message]) -> None:
    leading = 1 if messages[0]["role"] == "system" else 0
    if len(messages) == leading:
        raise BadLineError("a system message alone")
    for i, message in enumerate(messages[leading:]):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise BadLineError(f"wrong role order: message {leading + i + 1} is {message['role']}, not {expected}")
