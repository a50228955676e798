"""Answers from a server: whatever fails, every question is answered once, and no answer is written twice."""

import email.utils
import http.client
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import warm
from fake_server import END, INFO, FakeServer, Handler, completion
from vsd.data import Conversation, Server, ServerTeacher, encode, load_examples, prompt_inputs, regenerate
from vsd.data import server as client
from vsd.errors import ConfigurationError, DataError, MismatchError, TargetError


def chats(count: int) -> list[Conversation]:
    """Conversations of one and two turns."""
    return [
        Conversation(f"c{i}", f"f.jsonl:{i + 1}", [{"role": "user", "content": f"{i}.{t}"} for t in range(i % 2 + 1)])
        for i in range(count)
    ]


def run(server: FakeServer, out: Path, given: list[Conversation], **options: Any) -> Any:
    rate = options.pop("requests_per_second", None)
    model = options.pop("model", "tiny")
    options = {"max_new_tokens": 40, "concurrency": 4, "progress": False, **options}
    teacher = ServerTeacher(Server(server.url, model, rate), INFO, options.pop("concurrency"))
    return regenerate(teacher, given, out, **options)


def records(path: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["id"] for record in found}) == len(found)
    return {record["id"]: record for record in found}


@pytest.mark.parametrize("gives_ids", [True, False])
def test_records_are_those_of_regeneration_in_process(fake: Any, tmp_path: Path, gives_ids: bool) -> None:
    """The same record whether the server gives its tokens or its text is tokenised; turns see earlier answers."""
    server, out = fake(gives_ids=gives_ids), tmp_path / "out.jsonl"
    summary = run(server, out, chats(6))
    found = records(out)
    assert (summary.written, summary.skipped) == (len(found), 0) == (9, 0)
    assert summary.tokens == sum(len(record["response_ids"]) for record in found.values())
    for record in found.values():
        assert record["prompt_ids"] == prompt_inputs(INFO.tokenizer, record["messages"][:-1]).ids
        assert record["response_ids"][-1] == END and record["finish"] == "stop"
        text = record["messages"][-1]["content"]
        assert text == f"answer to {record['messages'][-2]['content']}"
        assert INFO.tokenizer.decode(record["response_ids"][:-1]) == text
    assert found["c1/1"]["messages"][:2] == found["c1/0"]["messages"]
    assert len(load_examples(out, INFO.tokenizer, 512)) == 9
    assert all(body["temperature"] == 0 and body["model"] == "tiny" for body in server.asked)


@pytest.mark.parametrize("gives_ids", [True, False])
def test_an_answer_cut_at_its_length_has_no_end(fake: Any, tmp_path: Path, gives_ids: bool) -> None:
    out = tmp_path / "out.jsonl"
    run(fake(gives_ids=gives_ids), out, chats(1), max_new_tokens=6)
    (record,) = records(out).values()
    assert record["finish"] == "length" and len(record["response_ids"]) == 6 and END not in record["response_ids"]


def test_prompts_that_are_tokens_are_sent_as_tokens(fake: Any, tmp_path: Path) -> None:
    server, out = fake(), tmp_path / "out.jsonl"
    run(server, out, [Conversation("x", "f:1", [], [20, 21, 22], [5])])
    (record,) = records(out).values()
    assert server.asked[0]["prompt"] == record["prompt_ids"] == [20, 21, 22]
    assert encode(INFO.tokenizer, Conversation("x", "f:1", [], [20, 21, 22], record["response_ids"]), 99)


def dropped(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def cut(handler: Handler) -> None:
    handler.raw(200, b'{"choices": [', Content_Length="500")
    handler.close_connection = True


FAULTS: dict[str, Callable[[Handler], None]] = {
    "429": lambda handler: handler.json(429, {"error": {"message": "slow down"}}),
    "500": lambda handler: handler.json(500, {"error": "out of luck"}),
    "503, not JSON": lambda handler: handler.raw(503, b"<html>busy</html>"),
    "dropped": dropped,
    "cut": cut,
    "malformed": lambda handler: handler.raw(200, b'{"choices": ['),
    "no choices": lambda handler: handler.json(200, {"choices": []}),
    "another kind": lambda handler: handler.json(200, {"choices": [{"message": {"content": 7}}]}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_temporary_failures_lose_no_answer(fake: Any, tmp_path: Path, name: str) -> None:
    server, out = fake(*[FAULTS[name]] * 5), tmp_path / "out.jsonl"
    assert run(server, out, chats(6)).written == 9
    assert len(records(out)) == 9 == len(server.asked)  # none was asked again after its answer had come


def test_all_failures_together_leave_the_same_records(fake: Any, tmp_path: Path) -> None:
    sound, failing = tmp_path / "sound.jsonl", tmp_path / "failing.jsonl"
    run(fake(), sound, chats(20))
    run(fake(*FAULTS.values(), *FAULTS.values()), failing, chats(20))
    without_order = [{k: {**r, "batch": 0} for k, r in records(path).items()} for path in (sound, failing)]
    assert without_order[0] == without_order[1]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(fake: Any, tmp_path: Path, form: str) -> None:
    until = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds: between one and two from now
    value = "0.7" if form == "seconds" else until
    server = fake(lambda handler: handler.json(429, {}, Retry_After=value))
    run(server, tmp_path / "out.jsonl", chats(1))
    assert server.times[1] - server.times[0] > 0.6


def test_the_rate_and_the_concurrency_are_limited(fake: Any, tmp_path: Path) -> None:
    server = fake(delay=0.05)
    run(server, tmp_path / "a.jsonl", chats(10), requests_per_second=50.0)
    times = sorted(server.times)
    assert times[-1] - times[0] > 0.9 * (len(times) - 1) / 50
    assert server.most <= 4
    server = fake(delay=0.1)
    run(server, tmp_path / "b.jsonl", chats(16), concurrency=8)
    assert 4 < server.most <= 8


def test_an_idle_connection_is_not_used_again(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers close those; a request on a closed one would fail."""
    server = fake()
    opened, accept = list[int](), server.get_request

    def accepted() -> Any:
        opened.append(1)
        return accept()

    monkeypatch.setattr(server, "get_request", accepted)
    ours = Server(server.url, "tiny")
    for idle, connections in ((60.0, 1), (60.0, 1), (-1.0, 2), (-1.0, 3), (60.0, 3)):
        monkeypatch.setattr(client, "_IDLE", idle)
        ours.ask([], [5, 6], max_tokens=3)
        assert len(opened) == connections
    ours.close()


def test_the_key_is_sent_and_not_stored(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = fake()
    run(server, tmp_path / "a.jsonl", chats(1))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    run(server, tmp_path / "b.jsonl", chats(1))
    assert server.keys == [None, "Bearer secret"]
    assert "secret" not in (tmp_path / "b.jsonl.meta.json").read_text()


@pytest.mark.parametrize("key", ["secret\n", "sec\r\nret", "sec ret", "secr\u00e9t"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY has a space, a line break") as refused:
        Server("http://localhost:8000", "tiny")
    assert key.strip() not in str(refused.value)


@pytest.mark.parametrize(
    ("method", "error"), [("__init__", http.client.InvalidURL("made up")), ("request", UnicodeError("made up"))]
)
def test_a_thread_whose_first_request_is_not_sent_tries_again(
    fake: Any, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception
) -> None:
    """It has no connection yet, or one that was never used."""
    sound, failures = getattr(http.client.HTTPConnection, method), [error]

    def fails_once(*arguments: Any, **options: Any) -> None:
        if failures:
            raise failures.pop()
        sound(*arguments, **options)

    monkeypatch.setattr(http.client.HTTPConnection, method, fails_once)
    ours = Server(fake().url, "tiny")
    ours.check()
    ours.close()
    assert not failures


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "OPENAI_API_KEY"), (404, "status 404: no such model"), (301, "status 301")],
)
def test_permanent_failures_raise_at_once(fake: Any, tmp_path: Path, status: int, reason: str) -> None:
    server = fake(lambda handler: handler.json(status, {"error": {"message": "no such model"}}))
    with pytest.raises(ConfigurationError, match=reason):
        run(server, tmp_path / "out.jsonl", chats(1))
    assert len(server.times) == 1


def test_a_conversation_that_the_server_refuses_is_a_bad_line(fake: Any, tmp_path: Path) -> None:
    refuse = lambda handler: handler.json(400, {"error": {"message": "too long for me"}})  # noqa: E731
    with pytest.raises(DataError, match=r"f\.jsonl:1: the server refuses it: too long for me"):
        run(fake(refuse), tmp_path / "a.jsonl", chats(1))
    reports: list[str] = []
    server = fake(refuse)
    options = {"on_bad_line": "skip", "report": reports.append, "concurrency": 1}
    summary = run(server, tmp_path / "b.jsonl", chats(3), **options)
    assert (summary.written, summary.skipped, len(reports)) == (3, 1, 1)


def test_a_server_that_does_not_answer_or_has_another_model(fake: Any, tmp_path: Path) -> None:
    server = fake()
    with pytest.raises(MismatchError, match="does not serve 'nobody': it has tiny, other"):
        run(server, tmp_path / "a.jsonl", chats(1), model="nobody")
    gone = Server("http://127.0.0.1:9", "tiny")
    with pytest.raises(TargetError, match="refused"):
        regenerate(ServerTeacher(gone, INFO), chats(1), tmp_path / "b.jsonl", progress=False)
    wrong = ("localhost:8000", "ftp://host", "http://", "http://host:port", "http://local host:8000", "http://a..b")
    for url in (*wrong, "http://host:8000/a path", "http://host/\u00fc"):
        with pytest.raises(ConfigurationError, match="no server's address"):
            Server(url, "tiny")


def test_tokens_of_another_target(fake: Any, tmp_path: Path) -> None:
    def other(ids: list[int]) -> Callable[[Handler], None]:
        choice = {"message": {"content": "hello"}, "finish_reason": "stop", "token_ids": ids}
        return lambda handler: handler.json(200, {"choices": [choice]})

    with pytest.raises(MismatchError, match="not in the vocabulary of 'tiny'"):
        run(fake(other([5000, 2])), tmp_path / "a.jsonl", chats(1))
    with pytest.raises(MismatchError, match="do not spell"):
        run(fake(other([20, 21, 2])), tmp_path / "b.jsonl", chats(1))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_answers_without_their_reasoning_are_refused(fake: Any, tmp_path: Path, field: str) -> None:
    """Text alone is not what the target wrote; token ids hold the reasoning, too."""

    def answer(content: str | None, **more: Any) -> Callable[[Handler], None]:
        choice = {"message": {"content": content, field: "hm"}, "finish_reason": "stop", **more}
        return lambda handler: handler.json(200, {"choices": [choice]})

    for content in ("yes", None):
        with pytest.raises(ConfigurationError, match="switch its reasoning parser off"):
            run(fake(answer(content)), tmp_path / f"{content}.jsonl", chats(1))
    whole = INFO.tokenizer("hm yes", add_special_tokens=False)["input_ids"]
    run(fake(answer("yes", token_ids=[*whole, END])), tmp_path / "ids.jsonl", chats(1))
    (record,) = records(tmp_path / "ids.jsonl").values()
    assert record["response_ids"] == [*whole, END] and record["messages"][-1]["content"] == "hm yes"


def test_empty_answers_are_reported_and_end_their_conversation(fake: Any, tmp_path: Path) -> None:
    empty = {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}
    reports: list[str] = []
    server = fake(lambda handler: handler.json(200, empty))
    summary = run(server, tmp_path / "a.jsonl", chats(2)[1:], report=reports.append, concurrency=1)
    assert (summary.written, summary.skipped) == (0, 2) and "is empty" in reports[0]


def test_answers_of_a_server_that_fails_for_good_are_kept(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails for longer than requests are retried; the same call with another server asks the other questions."""
    monkeypatch.setattr(client, "_RETRY_SECONDS", 0.1)
    out = tmp_path / "out.jsonl"
    serve = lambda handler: handler.json(200, completion(handler.path, {**BODY, "max_tokens": 40}))  # noqa: E731
    with pytest.raises(TargetError, match="run the same command again"):
        run(fake(serve, serve, *[FAULTS["500"]] * 1000), out, chats(1) * 6, concurrency=1)
    assert len(records(out)) == 2
    server = fake()
    assert run(server, out, chats(1) * 6).written == 6
    assert len(records(out)) == 6 and len(server.asked) == 4
    with pytest.raises(MismatchError, match="temperature was"):
        run(server, out, chats(1) * 6, temperature=1.0)


BODY = {"messages": [{"role": "user", "content": "0.0"}], "return_token_ids": True}


def client_of(url: str, out: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
    regenerate(ServerTeacher(Server(url, "tiny"), INFO, 4), chats(30), out, max_new_tokens=40)


def test_a_killed_client_continues_where_it_stopped(fake: Any, tmp_path: Path) -> None:
    server, out = fake(delay=0.2), tmp_path / "out.jsonl"
    for how, count in ((signal.SIGKILL, 5), (signal.SIGINT, 15)):
        child = warm.start(client_of, server.url, out, log=tmp_path / "log")
        while child.is_alive() and (not out.exists() or out.read_bytes().count(b"\n") < count):
            time.sleep(0.01)
        assert child.pid is not None
        os.kill(child.pid, how)
        child.join(20)
        assert child.exitcode is not None and count <= out.read_bytes().count(b"\n") < 45
    child = warm.start(client_of, server.url, out, log=tmp_path / "log")
    child.join()
    assert child.exitcode == 0 and len(records(out)) == 45
    assert len(server.asked) <= 45 + 2 * 2 * 4  # questions in progress at a kill are asked again, no others
