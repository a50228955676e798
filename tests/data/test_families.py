"""Template families: each line is trained as the template itself prints it for a server, or refused with its reason."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from templates import DATED, GEMMA, MISTRAL, QWEN3, R1, THINKING
from tiny import CHATML, tiny_tokenizer
from vsd.data import Example, encoded
from vsd.errors import DataError

EMPTY = "<think>\n\n</think>\n\n"
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}]
CALL = {"id": "123456789", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
SPOKEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
ASK, SURE = {"role": "user", "content": "ok?"}, {"role": "user", "content": "sure?"}
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
BE = {"role": "system", "content": "Be brief."}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "123456789", "content": '{"sum": 3}'}
TALK = [ASK, YES, SURE, NO]
WORK = [ASK, CALLING, RESULT, NO]


def thinks(message: dict[str, Any], thought: str) -> dict[str, Any]:
    return {**message, "reasoning_content": thought}


class Case(NamedTuple):
    """A line, and of each answer the context that the template inserts and the text that the target generates."""

    template: str
    messages: list[dict[str, Any]]
    answers: list[tuple[str, str]]
    row: Mapping[str, Any] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """What `apply_chat_template` is given."""
        tools = {"tools": self.row["tools"]} if "tools" in self.row else {}
        return {**tools, **self.row.get("chat_template_kwargs", {})}


TRAINED = {
    "qwen3, no thinking in the text": Case(QWEN3, [BE, *TALK], [(EMPTY, "Yes.<|im_end|>"), (EMPTY, "No.<|im_end|>")]),
    "qwen3, thinking off": Case(
        QWEN3,
        TALK,
        [("", "Yes.<|im_end|>"), ("", "No.<|im_end|>")],
        {"chat_template_kwargs": {"enable_thinking": False}},
    ),
    "qwen3, thinking": Case(
        QWEN3,
        [ASK, thinks(YES, "hm"), SURE, thinks(NO, "well")],
        [("", "<think>\nhm\n</think>\n\nYes.<|im_end|>"), ("", "<think>\nwell\n</think>\n\nNo.<|im_end|>")],
    ),
    "qwen3, thinking in the content": Case(
        QWEN3,
        [ASK, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}],
        [("", "<think>\nhm\n</think>\n\nYes.<|im_end|>")],
    ),
    "qwen3, tools": Case(
        QWEN3, WORK, [(EMPTY, f"{SPOKEN_CALL}<|im_end|>"), (EMPTY, "No.<|im_end|>")], {"tools": TOOLS}
    ),
    "qwen3, thinking and tools": Case(
        QWEN3,
        [BE, ASK, thinks({**CALLING, "content": "Let me see."}, "hm"), RESULT, thinks(NO, "3")],
        [
            ("", f"<think>\nhm\n</think>\n\nLet me see.{SPOKEN_CALL}<|im_end|>"),
            ("", "<think>\n3\n</think>\n\nNo.<|im_end|>"),
        ],
        {"tools": TOOLS},
    ),
    "thinking that the prompt opens": Case(
        THINKING,
        [ASK, thinks(YES, "hm"), SURE, thinks(NO, "well")],
        [("", "hm\n</think>\n\nYes.<|im_end|>"), ("", "well\n</think>\n\nNo.<|im_end|>")],
    ),
    "a date": Case(DATED, TALK, [("", "Yes.<|eot_id|>"), ("", "No.<|eot_id|>")]),
    "a given date": Case(
        DATED, [ASK, YES], [("", "Yes.<|eot_id|>")], {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}
    ),
    "gemma": Case(GEMMA, TALK, [("", "Yes.<end_of_turn>"), ("", "No.<end_of_turn>")]),
    "mistral": Case(MISTRAL, [BE, *TALK], [("", " Yes.</s>"), ("", " No.</s>")]),
    "mistral, tools": Case(
        MISTRAL,
        [ASK, CALLING],
        [("", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}}]</s>')],
        {"tools": TOOLS},
    ),
    "developer": Case(CHATML, [{"role": "developer", "content": "Be brief."}, ASK, YES], [("", "Yes.<|im_end|>")]),
    "several user turns": Case(CHATML, [ASK, SURE, YES], [("", "Yes.<|im_end|>")]),
    "a later system turn": Case(CHATML, [ASK, YES, BE, SURE, NO], [("", "Yes.<|im_end|>"), ("", "No.<|im_end|>")]),
    "a tool's text in the content": Case(
        CHATML, [ASK, YES, {"role": "tool", "content": "3"}, NO], [("", "Yes.<|im_end|>"), ("", "No.<|im_end|>")]
    ),
    "cut": Case(QWEN3, TALK, [(EMPTY, "Yes.<|im_end|>"), (EMPTY, "No.")], {"finish": "length"}),
    "cut in its thinking": Case(
        QWEN3, [ASK, {"role": "assistant", "content": "<think>\nhm"}], [("", "<think>\nhm")], {"finish": "length"}
    ),
    "cut, with reasoning": Case(
        QWEN3, [ASK, thinks(YES, "hm")], [("", "<think>\nhm\n</think>\n\nYes.")], {"finish": "length"}
    ),
}


def written(path: Path, row: dict[str, Any]) -> Path:
    path.write_text(json.dumps(row) + "\n")
    return path


def as_sent(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a server gives them to the template: arguments of tool calls are objects."""
    sent: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for call in (call for message in sent for call in message.get("tool_calls", [])):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return sent


def spelled(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def answers_in(example: Example, tokenizer: Any) -> list[tuple[str, str]]:
    """(text before it, text) of every answer; its first token is the one before the drafted ones."""
    drafted, found, end = [*example.drafted, False], [], 0
    while True in drafted[end:]:
        start = drafted.index(True, end) - 1
        end = drafted.index(False, start + 1)
        ids = example.inputs.ids
        found.append((spelled(tokenizer, ids[:start]), spelled(tokenizer, ids[start:end])))
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_answers_are_trained_in_the_context_that_the_template_prints_for_a_server(name: str, tmp_path: Path) -> None:
    case = TRAINED[name]
    tokenizer = tiny_tokenizer(case.template)
    file = written(tmp_path / "f.jsonl", {"messages": case.messages, **case.row})
    ((_, examples),) = encoded(file, tokenizer, 9999)
    found = [answer for example in examples for answer in answers_in(example, tokenizer)]
    messages = as_sent(case.messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    expected = []
    for turn, (inserted, spoken) in zip(turns, case.answers, strict=True):
        served = tokenizer.apply_chat_template(
            messages[:turn], tokenize=False, add_generation_prompt=True, **case.arguments
        )
        expected.append((served + inserted, spoken))
    assert found == expected
    whole = tokenizer.apply_chat_template(messages, tokenize=False, **case.arguments)
    context, spoken = expected[-1]
    if "cut" not in name and "off" not in name:  # of these the template prints what a server does not
        assert whole.startswith(context + spoken) and spelled(tokenizer, examples[-1].inputs.ids) == whole


def test_a_date_is_that_of_today() -> None:
    text = tiny_tokenizer(DATED).apply_chat_template([ASK], tokenize=False)
    assert datetime.now().strftime("%d %b %Y") in text


REFUSED: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], str]] = {
    "gemma: system": (GEMMA, [BE, ASK, YES], {}, "no system role"),
    "gemma: two user turns": (GEMMA, [ASK, SURE, YES], {}, "roles must alternate"),
    "gemma: tool": (GEMMA, WORK, {"tools": TOOLS}, "roles must alternate"),
    "mistral: two user turns": (MISTRAL, [ASK, SURE, YES], {}, "roles must alternate"),
    "mistral: developer": (
        MISTRAL,
        [{"role": "developer", "content": "x"}, ASK, YES],
        {},
        r"does not print the developer message \(message 1\)",
    ),
    "r1: system": (R1, [BE, ASK, YES], {}, r"does not print the system message \(message 1\)"),
    "r1: reasoning": (R1, [ASK, thinks(YES, "hm")], {}, "does not print the reasoning_content of an answer"),
    "r1: no thinking": (R1, [ASK, YES], {}, "opens <think> in the prompt and the answer does not close it"),
    "opened thinking, none": (THINKING, [ASK, YES], {}, "opens <think> in the prompt and the answer does not close it"),
    "opened thinking, a call": (THINKING, [ASK, CALLING], {"tools": TOOLS}, "the answer does not close it"),
    "thinking off, but thinks": (
        QWEN3,
        [ASK, thinks(YES, "hm")],
        {"chat_template_kwargs": {"enable_thinking": False}},
        "cannot be trained on as they are served",
    ),
    "chatml: tools": (CHATML, [ASK, YES], {"tools": TOOLS}, "does not print the tools"),
    "chatml: tool calls": (CHATML, [ASK, CALLING], {}, "does not print the tool calls of an answer"),
    "chatml: reasoning": (CHATML, [ASK, thinks(YES, "hm")], {}, "does not print the reasoning_content of an answer"),
    "cut tool call": (QWEN3, [ASK, CALLING], {"finish": "length", "tools": TOOLS}, "a cut answer has tool calls"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_server_would_not_answer_like_this_is_refused(name: str, tmp_path: Path) -> None:
    template, messages, row, reason = REFUSED[name]
    file = written(tmp_path / "f.jsonl", {"messages": messages, **row})
    with pytest.raises(DataError, match=rf"f\.jsonl:1: .*{reason}") as error:
        list(encoded(file, tiny_tokenizer(template), 9999))
    assert "\n" not in str(error.value)


def test_a_cut_answer_of_our_own_records_has_no_end(tmp_path: Path) -> None:
    """Its tokens are the record's, and the last of them is supervised, but no end of turn behind it."""
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, return_dict=False)
    row = {"messages": [ASK, YES], "prompt_ids": prompt, "response_ids": tokenizer.encode("Yes."), "finish": "length"}
    ((conversation, (example,)),) = encoded(written(tmp_path / "f.jsonl", row), tokenizer, 999)
    assert conversation.cut
    assert answers_in(example, tokenizer) == [(spelled(tokenizer, prompt), "Yes.")]
    assert len(example.inputs.ids) == len(prompt) + 4
