"""Reads conversations from JSONL files, text files and data sets of the Hugging Face hub.

A line of a file (or a row of a data set) is one of

    {"messages": [{"role": "user", "content": "…"}, …]}       OpenAI
    {"conversations": [{"from": "human", "value": "…"}, …]}   ShareGPT
    {"turns": ["…", …]}                                       user turns only, as in MT-bench
    {"prompt": "…"}                                           one user turn
    {"prompt_ids": […], "response_ids": […]}                  the target's own tokens, by `vsd data`

with an optional "id". The messages are at most one system message, then user and assistant alternately. Prompts without
answers (`turns`, `prompt`, a `.txt` file with one prompt a line) are for regeneration, not for training. A line that
cannot be used is an error, or is reported and skipped; it is never changed to fit.
"""

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vsd.errors import DataError

OnBadLine = Literal["fatal", "skip"]
Report = Callable[[str], None]
Message = dict[str, str]

LOG = logging.getLogger("vsd.data")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class Conversation(NamedTuple):
    """One conversation.

    Attributes:
        id: the line's "id", else the file's name and the line's number.
        where: the line's place, "file.jsonl:12", for messages to the user.
        messages: as a chat template takes them; empty where the line has token ids alone.
        prompt_ids, response_ids: the target's own tokens of the last turn, where the line has them.
    """

    id: str
    where: str
    messages: list[Message]
    prompt_ids: list[int] | None = None
    response_ids: list[int] | None = None


class BadLineError(DataError):
    """A line that cannot be used. The message names the reason; the reader of the file adds the place."""


def read_conversations(
    source: str | Path,
    *,
    on_bad_line: OnBadLine = "fatal",
    report: Report | None = None,
    need_answer: bool = True,
) -> Iterator[Conversation]:
    """Read a `.jsonl`, `.jsonl.gz` or `.txt` file, or a data set of the Hugging Face hub, `hf:NAME[:SPLIT]`.

    Args:
        on_bad_line: "fatal" raises at the first bad line, "skip" reports it and continues.
        report: called with "FILE:LINE: REASON" for every skipped line; default: a logged warning.
        need_answer: False where only the user turns are used, as in regeneration.

    Raises:
        DataError: a bad line, when fatal; no usable line in the source; no such source.
    """
    lines, parse = _open(source, need_answer)
    usable = 0
    for where, name, line in lines:
        try:
            conversation = _conversation(parse(line), where, name, need_answer)
        except BadLineError as error:
            handle_bad_line(f"{where}: {error}", on_bad_line, report)
            continue
        usable += 1
        yield conversation
    if not usable:
        raise DataError(f"{source} holds no usable conversation")


def handle_bad_line(message: str, on_bad_line: OnBadLine, report: Report | None) -> None:
    """Raise DataError, or report the line as skipped."""
    if on_bad_line == "fatal":
        raise DataError(message)
    (report or LOG.warning)(message)


Lines = Iterator[tuple[str, str, Any]]  # (where, default id, raw line)


def _open(source: str | Path, need_answer: bool) -> tuple[Lines, Callable[[Any], Any]]:
    path = Path(source)
    if path.suffix == ".txt" and need_answer:
        raise DataError(f"{source} holds prompts without answers: make them with `vsd data regenerate` first")
    if path.name.endswith((".jsonl", ".jsonl.gz", ".txt")):
        return _file_lines(path), _prompt if path.suffix == ".txt" else _json
    if path.is_file():
        raise DataError(f"{source}: expected a .jsonl, .jsonl.gz or .txt file")
    return _dataset_rows(str(source)), lambda row: row


def _file_lines(path: Path) -> Lines:
    stem = path.name.split(".")[0]
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", f"{stem}-{number:06d}", line.removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError as error:
        raise DataError(f"no file at '{path}'") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read after line {number}: {error}") from error


def _dataset_rows(source: str) -> Lines:
    """Rows of `hf:NAME[:SPLIT]` or `hf:NAME:CONFIG:SPLIT`, streamed."""
    import datasets  # slow to import

    name, *rest = source.removeprefix("hf:").split(":")
    config, split = (rest[0], rest[1]) if len(rest) == 2 else (None, rest[0] if rest else "train")
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield f"{name}[{split}]:{number}", f"{split}-{number:06d}", row
    except Exception as error:  # of the hub, the network or a parser: they have no common class
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"cannot read data set '{name}' (split '{split}'): {reason}") from error


def _text(line: bytes) -> str:
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        raise BadLineError("not UTF-8") from error
    if not text:
        raise BadLineError("empty line")
    return text


def _prompt(line: bytes) -> dict[str, Any]:
    return {"prompt": _text(line)}


def _json(line: bytes) -> Any:
    text = _text(line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not JSON ({error})") from error


def _conversation(row: Any, where: str, name: str, need_answer: bool) -> Conversation:
    if not isinstance(row, dict):
        raise BadLineError(f"expected a JSON object, found {type(row).__name__}")
    exact = row.get("prompt_ids") is not None
    prompt_ids, response_ids = _exact_ids(row, need_answer) if exact else (None, None)
    messages = _messages(row, exact)
    if messages and need_answer:
        _check_answer([m["role"] for m in messages])
    own_id = row.get("id")
    return Conversation(name if own_id in (None, "") else str(own_id), where, messages, prompt_ids, response_ids)


def _messages(row: dict[str, Any], exact: bool) -> list[Message]:
    """Messages with the roles system, user and assistant, from any of the row formats."""
    if row.get("messages") is not None:
        return _in_order([_message(m, "role", "content") for m in _list(row, "messages")])
    if row.get("conversations") is not None:
        return _in_order([_message(m, "from", "value") for m in _list(row, "conversations")])
    if row.get("turns") is not None:
        return [{"role": "user", "content": _content(turn)} for turn in _list(row, "turns")]
    if row.get("prompt") is not None:
        return [{"role": "user", "content": _content(row["prompt"])}]
    if exact:
        return []
    found = ", ".join(sorted(map(str, row))) or "nothing"
    raise BadLineError(f"no messages: expected messages, conversations, turns, prompt or prompt_ids, found {found}")


def _list(row: dict[str, Any], key: str) -> list[Any]:
    items = row[key]
    if not isinstance(items, list) or not items:
        raise BadLineError(f"{key} must be a list that is not empty")
    return items


def _message(message: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(message, dict) or role_key not in message or content_key not in message:
        raise BadLineError(f'a message needs "{role_key}" and "{content_key}"')
    role = message[role_key]
    role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ("system", "user", "assistant"):
        raise BadLineError(f"role {role!r} is not system, user or assistant")
    return {"role": role, "content": _content(message[content_key])}


def _content(content: Any) -> str:
    if not isinstance(content, str):
        raise BadLineError(f"the content of a message must be text, found {type(content).__name__}")
    if not content.strip():
        raise BadLineError("a message is empty")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadLineError("a message holds half a surrogate pair: not valid Unicode") from error
    return content


def _in_order(messages: list[Message]) -> list[Message]:
    leading = 1 if messages[0]["role"] == "system" else 0
    if len(messages) == leading:
        raise BadLineError("a system message alone")
    for i, message in enumerate(messages[leading:]):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise BadLineError(f"wrong role order: message {leading + i + 1} is {message['role']}, not {expected}")
    return messages


def _check_answer(roles: list[str]) -> None:
    if "assistant" not in roles:
        raise BadLineError("there is no answer: make one with `vsd data regenerate`")
    if roles[-1] != "assistant":
        raise BadLineError("the last message is not an answer")


def _exact_ids(row: dict[str, Any], need_answer: bool) -> tuple[list[int], list[int]]:
    for key in ("prompt_ids", "response_ids"):
        ids = row.get(key, [])
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise BadLineError(f"{key} must be a list of token ids")
    prompt_ids, response_ids = row["prompt_ids"], row.get("response_ids", [])
    if not prompt_ids:
        raise BadLineError("prompt_ids is empty")
    if need_answer and not response_ids:
        raise BadLineError("response_ids is empty: there is no answer")
    return prompt_ids, response_ids
