"""Prompt files for measuring: single- and multi-turn, in any form `vsd.data` reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vsd.data import read_conversations


class Prompt(NamedTuple):
    """User turns to be answered one after another, and the file (suite) they came from."""

    id: str
    suite: str
    system: str | None
    turns: list[str]


def load_prompts(files: Sequence[str | Path], limit: int | None = None) -> list[Prompt]:
    """The user turns of every conversation; of each file at most `limit`, evenly spread over it.

    Raises:
        VSDError: a bad line, with file and line number.
    """
    prompts = []
    for file in files:
        found = []
        for conversation in read_conversations(file, need_answer=False):
            turns = [m["content"] for m in conversation.messages if m["role"] == "user"]
            systems = [m["content"] for m in conversation.messages if m["role"] == "system"]
            found.append(Prompt(conversation.id, Path(file).name.split(".")[0], systems[0] if systems else None, turns))
        count = min(limit or len(found), len(found))
        prompts += [found[i * len(found) // count] for i in range(count)]
    return prompts
