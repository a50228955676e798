"""Every accepted shape is read alike; every bad line is named and never gets through."""

import gzip
import json
from pathlib import Path

import pytest

from vsd.data import read_conversations
from vsd.errors import DataError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
PART, CALL = {"type": "text", "text": "Hi"}, {"name": "add", "arguments": {}}
GOOD = json.dumps({"id": "good", "messages": [USER, ANSWER]})

BAD = {
    "not JSON": b'{"messages": ',
    "empty line": b"   ",
    "not UTF-8": b'{"messages": "\xff"}',
    "expected a JSON object, found list": b"[1]",
    "no messages": b'{"text": "hello"}',
    "messages must be a list that is not empty": b'{"messages": []}',
    "conversations must be a list": b'{"conversations": "hello"}',
    'a message needs "role" and "content"': b'{"messages": [{"role": "user"}]}',
    'or "from" and "value"': b'{"conversations": ["hello"]}',
    "role 'poet' is not": b'{"messages": [{"role": "poet", "content": "x"}]}',
    "role None is not": b'{"messages": [{"role": null, "content": "x"}]}',
    "a message is empty": b'{"messages": [{"role": "user", "content": " "}]}',
    "must be text, found list": b'{"messages": [{"role": "user", "content": []}]}',
    "must be text, found int": b'{"prompt": 7}',
    "part of type 'input_audio'": b'{"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}',
    "more places for images than the 0": b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    "several text parts": json.dumps({"messages": [{"role": "user", "content": [PART, PART]}, ANSWER]}).encode(),
    "half a surrogate pair": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "message 1 is assistant, after nothing": json.dumps({"messages": [ANSWER, USER]}).encode(),
    "message 3 is assistant, after assistant": json.dumps({"messages": [USER, ANSWER, ANSWER]}).encode(),
    "message 2 is tool, after user": json.dumps({"messages": [USER, {"role": "tool", "content": "x"}]}).encode(),
    "tool_calls in a message of role user": json.dumps({"messages": [{**USER, "tool_calls": [CALL]}]}).encode(),
    "a tool call needs a name": json.dumps({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}).encode(),
    "are not JSON": json.dumps({"messages": [USER, {**ANSWER, "tool_calls": [{**CALL, "arguments": "{"}]}]}).encode(),
    "must be an object": json.dumps(
        {"messages": [USER, {**ANSWER, "tool_calls": [{**CALL, "arguments": [1]}]}]}
    ).encode(),
    "tools must be a list of objects": json.dumps({"messages": [USER, ANSWER], "tools": ["add"]}).encode(),
    "chat_template_kwargs must be": json.dumps({"messages": [USER, ANSWER], "chat_template_kwargs": 1}).encode(),
    "cannot set tokenize": json.dumps({"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": 1}}).encode(),
    "there is no answer": json.dumps({"messages": [USER]}).encode(),
    "the last message is not an answer": json.dumps({"messages": [USER, ANSWER, USER]}).encode(),
    "prompt_ids must be a list of token ids": b'{"prompt_ids": [1.5], "response_ids": [1]}',
    "response_ids must be a list of token ids": b'{"prompt_ids": [1], "response_ids": "x"}',
    "prompt_ids is empty": b'{"prompt_ids": [], "response_ids": [1]}',
    "response_ids is empty": b'{"prompt_ids": [1]}',
}


def read(path: Path, **options):
    return list(read_conversations(path, **options))


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("reason", BAD)
def test_bad_lines_are_named_and_left_out(reason: str, tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(GOOD.encode() + b"\n" + BAD[reason] + b"\n" + GOOD.encode())
    reports: list[str] = []
    assert [c.where for c in read(file, on_bad_line="skip", report=reports.append)] == [f"{file}:1", f"{file}:3"]
    assert len(reports) == 1
    assert reports[0].startswith(f"{file}:2: ")
    assert reason in reports[0]
    with pytest.raises(DataError) as error:
        read(file)
    assert str(error.value) == reports[0]
    assert "\n" not in reports[0]


def test_all_shapes_say_the_same(tmp_path: Path) -> None:
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    named = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yo"}]
    parts = [{"role": "user", "content": [PART]}, {**ANSWER, "tool_calls": None}]
    rows = [{"messages": m} for m in ([USER, ANSWER], named, parts)]
    rows += [{"conversations": m} for m in (sharegpt, named, [USER, ANSWER])]
    file = write(tmp_path / "f.jsonl", *rows)
    assert [c.messages for c in read(file)] == [[USER, ANSWER]] * 6
    prompts = write(tmp_path / "p.jsonl", {"turns": ["Hi"]}, {"prompt": "Hi"}, {"messages": [USER], "id": 7})
    text = tmp_path / "p.txt"
    text.write_text("Hi\n")
    found = read(prompts, need_answer=False) + read(text, need_answer=False)
    assert [c.messages for c in found] == [[USER]] * 4
    assert [c.id for c in found] == ["p-000001", "p-000002", "7", "p-000001"]


def test_messages_as_a_server_gives_them_to_the_template(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    calling = {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]}
    result = {"role": "tool", "content": "", "tool_call_id": "1"}
    row = {"messages": [USER, calling, result, ANSWER], "tools": json.dumps([{"name": "add"}]), "system": "Be brief."}
    row |= {"chat_template_kwargs": {"enable_thinking": False}, "finish": "length"}
    (found,) = read(write(tmp_path / "f.jsonl", row))
    object_call = {**call, "function": {"name": "add", "arguments": {"a": 1}}}
    assert found.messages == [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [object_call]},
        result,
        ANSWER,
    ]
    assert found.arguments == {"tools": [{"name": "add"}], "enable_thinking": False}
    assert found.cut


PROMPTS = {
    "tools cannot be given": {"messages": [USER], "tools": [{"name": "add"}]},
    "message 2 is user, not assistant": {"messages": [USER, USER]},
    "message 1 is developer, not user": {"messages": [{"role": "developer", "content": "x"}, USER]},
    "a system message alone": {"messages": [{"role": "system", "content": "x"}]},
}


@pytest.mark.parametrize("reason", PROMPTS)
def test_prompts_that_cannot_be_answered_turn_by_turn_are_refused(reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"f\.jsonl:1: .*{reason}"):
        read(write(tmp_path / "f.jsonl", PROMPTS[reason]), need_answer=False)


def test_several_turns_without_answers(tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", {"turns": ["Hi", "And?"]})
    assert [m["content"] for m in read(file, need_answer=False)[0].messages] == ["Hi", "And?"]


def test_exact_tokens_and_gzip(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl.gz"
    with gzip.open(file, "wt") as stream:
        stream.write('{"id": "x", "prompt_ids": [5, 6], "response_ids": [7, 2]}\n')
    (conversation,) = read(file)
    assert conversation[:5] == ("x", f"{file}:1", [], [5, 6], [7, 2])
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read after line"):
        read(file)


def test_sources_that_yield_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file at"):
        read(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no usable conversation"):
        read(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="no usable conversation"):
        read(write(tmp_path / "bad.jsonl", {}), on_bad_line="skip")
    (tmp_path / "p.txt").write_text("Hi\n")
    with pytest.raises(DataError, match="prompts without answers"):
        read(tmp_path / "p.txt")
    (tmp_path / "p.csv").touch()
    with pytest.raises(DataError, match=r"expected a \.jsonl"):
        read(tmp_path / "p.csv")
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        (tmp_path / "d.jsonl").mkdir()
        read(tmp_path / "d.jsonl")


@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is a data set too, so this needs no hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", {"messages": [USER, ANSWER]}, {"messages": [USER]})
    reports: list[str] = []
    (found,) = read(Path(f"hf:{tmp_path}/set:train"), on_bad_line="skip", report=reports.append)
    assert found.messages == [USER, ANSWER]
    assert reports == [f"{tmp_path}/set[train]:1: there is no answer: make one with `vsd data regenerate`"]
    with pytest.raises(DataError, match=r"cannot read data set '.*' \(split 'nope'\)"):
        read(Path(f"hf:{tmp_path}/set:nope"))
