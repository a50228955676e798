"""Reads conversations from files, folders and data sets of the Hugging Face hub (`vsd.data.sources` lists them).

A line of a file, or a row of a table, is one of

    {"messages": [{"role": "user", "content": "…"}, …]}       OpenAI
    {"conversations": [{"from": "human", "value": "…"}, …]}   ShareGPT
    {"turns": ["…", …]}                                       user turns only, as in MT-bench
    {"prompt": "…"}                                           one user turn
    {"prompt_ids": […], "response_ids": […]}                  the target's own tokens, by `vsd data`

with optional fields: "id"; "system", a system message; "tools" and "chat_template_kwargs", as in a request to a server;
"image" or "images" (`vsd.data.pictures`); "finish", which is "length" if the last answer was cut off; the labels
"category", "source", "language" and "thinking", by which `vsd bench` splits its numbers. Prompts without answers
(`turns`, `prompt`, a `.txt` file) are for regeneration, not for training. A line that cannot be used is an error, or is
reported and skipped; it is never changed to fit.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vsd.data.lines import LOG, BadLineError, OnBadLine, Report, handle_bad_line
from vsd.data.messages import Message, messages_of, template_arguments
from vsd.data.sources import Row, read_rows
from vsd.errors import DataError

LABELS = ("category", "source", "language", "thinking")


class Conversation(NamedTuple):
    """One conversation.

    Attributes:
        id: the line's "id", else the file's name and the line's number.
        where: the line's place, "file.jsonl:12", for messages to the user.
        messages: as a chat template takes them; empty where the line has token ids alone.
        prompt_ids, response_ids: the target's own tokens of the last turn, where the line has them.
        arguments: what the chat template is given besides messages, such as tools.
        cut: the last answer ended at a limit of tokens, not by itself.
        labels: the line's own fields of `LABELS`, as text.
    """

    id: str
    where: str
    messages: list[Message]
    prompt_ids: list[int] | None = None
    response_ids: list[int] | None = None
    arguments: Mapping[str, Any] = {}
    cut: bool = False
    labels: Mapping[str, str] = {}


def read_conversations(
    source: str | Path,
    *,
    on_bad_line: OnBadLine = "fatal",
    report: Report | None = None,
    need_answer: bool = True,
    download_images: bool = False,
) -> Iterator[Conversation]:
    """Read a file, a folder of files, or a data set of the Hugging Face hub, `hf:NAME[:SPLIT]`.

    Args:
        on_bad_line: "fatal" raises at the first bad line, "skip" reports it and continues.
        report: called with "FILE:LINE: REASON" for every skipped line; default: a logged warning.
        need_answer: False where only the user turns are used, as in regeneration.
        download_images: fetch images from http URLs; else a line with one is bad.

    Raises:
        DataError: a bad line, when fatal; no usable line in the source; no such source.
    """
    usable = 0
    rows = read_rows(source, report or LOG.warning, need_answer=need_answer)
    for conversation in conversations_of(rows, on_bad_line, report, need_answer, download_images):
        usable += 1
        yield conversation
    if not usable:
        raise DataError(f"{source} holds no usable conversation")


def conversations_of(
    rows: Iterable[Row], on_bad_line: OnBadLine, report: Report | None, need_answer: bool, download_images: bool
) -> Iterator[Conversation]:
    """The conversations of rows; arguments as in `read_conversations`.

    Raises:
        DataError: a bad line, when fatal.
    """
    for row in rows:
        try:
            conversation = _conversation(row.parse(row.raw), row, need_answer, download_images)
        except BadLineError as error:
            handle_bad_line(f"{row.where}: {error}", on_bad_line, report)
            continue
        yield conversation


def _conversation(row: Any, place: Row, need_answer: bool, download: bool) -> Conversation:
    if not isinstance(row, dict):
        raise BadLineError(f"expected a JSON object, found {type(row).__name__}")
    exact = row.get("prompt_ids") is not None
    prompt_ids, response_ids = _exact_ids(row, need_answer) if exact else (None, None)
    messages = messages_of(row, exact=exact, need_answer=need_answer, folder=place.folder, download=download)
    arguments = template_arguments(row)
    if messages and need_answer:
        _check_answer([m["role"] for m in messages])
    if arguments and not need_answer:
        raise BadLineError(
            f"{min(arguments)} cannot be given: prompts are answered without tools and template arguments"
        )
    own_id, cut = row.get("id"), row.get("finish") == "length"
    own_id = place.name if own_id in (None, "") else str(own_id)
    return Conversation(own_id, place.where, messages, prompt_ids, response_ids, arguments, cut, _labels(row))


def _labels(row: dict[str, Any]) -> dict[str, str]:
    """The labels of a row: texts and numbers as they are, true and false as in JSON."""
    found = {name: row[name] for name in LABELS if isinstance(row.get(name), str | int)}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in found.items()}


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
