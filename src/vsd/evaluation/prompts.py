"""Prompt files for evaluation: single- and multi-turn, in every format that `vsd.data` reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vsd.data import read_conversations
from vsd.errors import DataError


class Prompt(NamedTuple):
    """The user turns of one conversation.

    Attributes:
        suite: name of the prompt file, without its suffixes.
        system: system message, if there is one.
        turns: contents of user messages, answered one after another: a text, or texts and images.
        labels: the line's own category, source, language and thinking, where it has them.
    """

    id: str
    suite: str
    system: str | None
    turns: list[Any]
    labels: Mapping[str, str] = {}


def has_images(prompt: Prompt) -> bool:
    """Whether some turn has an image."""
    return any(not isinstance(turn, str) for turn in prompt.turns)


def load_prompts(files: Sequence[str | Path], limit: int | None = None) -> list[Prompt]:
    """The prompts of all files; at most `limit` of each, evenly spaced over the file.

    Raises:
        DataError: a file that does not exist, or a bad line; the message names file and line.
    """
    prompts = []
    for file in files:
        suite, found = Path(file).name.split(".")[0], []
        for c in read_conversations(file, need_answer=False):
            turns = [m["content"] for m in c.messages if m["role"] == "user"]
            if not turns:
                raise DataError(f"{c.where}: it holds tokens alone: prompts need text (messages or prompt)")
            systems = [m["content"] for m in c.messages if m["role"] == "system"]
            found.append(Prompt(c.id, suite, systems[0] if systems else None, turns, c.labels))
        count = min(limit or len(found), len(found))
        prompts += [found[i * len(found) // count] for i in range(count)]
    return prompts
