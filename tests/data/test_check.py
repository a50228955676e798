"""Counts of a text against those worked out by hand, and the marks of supervised tokens."""

import json
from pathlib import Path

from templates import DATED, QWEN3
from tiny import CHATML, tiny_tokenizer
from vsd.data import count_text, encoded, marked_text

ASK = {"role": "user", "content": "Hi"}
YES, LONG = {"role": "assistant", "content": "Yes"}, {"role": "assistant", "content": "Yes, yes"}


def count(rows: list[dict], folder: Path, template: str = CHATML):
    file = folder / "f.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer(template)
    return count_text(tokenizer, encoded(file, tokenizer, 999))


def test_counts(tmp_path: Path) -> None:
    rows = [{"messages": [ASK, YES]}, {"messages": [ASK, LONG, ASK, YES], "id": "x"}]
    rows += [{"messages": [ASK, YES], "id": "x", "finish": "length"}, {"messages": [ASK, YES]}]
    found = count(rows, tmp_path)
    turn = len("Suser~HiE~") + len("Sassistant~YesE~")  # a control token is one letter here, as in test_template
    long = 2 * turn + len(", yes")
    assert (found.conversations, found.answers, found.sequences, found.cut) == (4, 5, 4, 1)
    assert found.tokens == 3 * turn + long
    assert found.supervised.total() == 3 + (8 + 3) + 2 + 3  # all but the first token of an answer, and its end
    assert found.longest == (long, f"{tmp_path}/f.jsonl:2")
    assert (found.repeated, found.repeated_ids) == (2, 1)
    assert found.thinking == {"no thinking": 5}


def test_thinking(tmp_path: Path) -> None:
    rows = [
        {"messages": [ASK, {**YES, "reasoning_content": "hm"}, ASK, YES]},
        {"messages": [ASK, {**YES, "content": "No"}]},
    ]
    rows += [{"messages": [ASK, YES], "chat_template_kwargs": {"enable_thinking": False}}]
    found = count(rows, tmp_path, QWEN3)
    assert found.thinking == {"thinks": 1, "empty block": 3}
    assert (found.conversations, found.sequences) == (3, 4)


def test_a_template_with_a_date_is_named(tmp_path: Path) -> None:
    assert count([{"messages": [ASK, YES]}], tmp_path, DATED).dated
    assert not count([{"messages": [ASK, YES]}], tmp_path).dated


def test_marks(tmp_path: Path) -> None:
    _, (example,) = count([{"messages": [ASK, YES]}], tmp_path).sample
    assert list(marked_text(tiny_tokenizer(), example)) == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nY", False),
        ("es<|im_end|>", True),
        ("\n", False),
    ]
