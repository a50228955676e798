"""Prompts are read while others are answered, and forgotten when they are: memory does not grow with their number."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest

from fake_server import INFO, FakeServer, completion
from vsd.data import Conversation, Server, ServerTeacher, TargetTeacher, regenerate, target_teacher
from vsd.data.progress import ConversationBar
from vsd.data.questions import Tally
from vsd.data.records import RecordLog
from vsd.data.sources import count_rows, read_rows
from vsd.errors import DataError, MismatchError
from vsd.targets.target import Target

COUNT, CONCURRENCY = 120, 4


class Text(str):
    """A text that a WeakSet can hold."""


class Source:
    """Conversations of one and two turns: how many were read, and how many of their texts are alive."""

    def __init__(self, count: int = COUNT, note: str = "") -> None:
        self.count, self.note, self.read, self.most = count, note, 0, 0
        self.alive: WeakSet[Text] = WeakSet()

    def __iter__(self) -> Iterator[Conversation]:
        for i in range(self.count):
            texts = [Text(f"{self.note}{i}.{turn}") for turn in range(i % 2 + 1)]
            self.alive.update(texts)
            self.read += 1
            self.most = max(self.most, len(self.alive))
            yield Conversation(f"c{i}", f"f.jsonl:{i + 1}", [{"role": "user", "content": text} for text in texts])


class Asked(FakeServer):
    """Notes how far the source was read when each question came; keeps the last words of the messages."""

    def __init__(self, source: Source | None = None) -> None:
        self.source, self.reads, self.words = source, list[int](), list[str]()
        super().__init__()

    def completion(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.reads.append(self.source.read if self.source else 0)
        self.words.append(body["messages"][-1]["content"])
        return completion(path, body)


@pytest.fixture
def fake(fake: Callable[..., Any]) -> Callable[..., Asked]:
    return lambda source=None: fake(source, kind=Asked)


def by_server(server: FakeServer, source: Any, out: Path, **options: Any) -> Any:
    teacher = ServerTeacher(Server(server.url, "tiny"), INFO, CONCURRENCY)
    return regenerate(teacher, iter(source), out, max_new_tokens=40, progress=False, **options)


def in_process(target: Target, source: Any, out: Path, batch_size: int = 2) -> Any:
    options: dict[str, Any] = {"max_new_tokens": 3, "temperature": 1.0, "progress": False}
    return regenerate(TargetTeacher(target, batch_size), iter(source), out, **options)


def records(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({record["id"] for record in found}) == len(found)
    return {record["id"]: {**record, "batch": 0} for record in found}


def test_a_server_is_asked_before_the_prompts_are_read(fake: Any, tmp_path: Path) -> None:
    source = Source()
    server = fake(source)
    assert by_server(server, source, tmp_path / "out.jsonl").written == COUNT * 3 // 2
    assert server.reads[0] <= CONCURRENCY and server.reads[-1] == COUNT
    # every request in flight, and the one that is answered, is a conversation of two turns at most
    assert all(read <= number + CONCURRENCY for number, read in enumerate(server.reads, start=1))
    assert source.most <= 2 * (2 * CONCURRENCY + 1)


def test_the_target_is_asked_before_the_prompts_are_read(
    tiny_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reads = Source(), list[int]()
    real = target_teacher.generate_batch

    def generate(*given: Any, **options: Any) -> Any:
        reads.append(source.read)
        return real(*given, **options)

    monkeypatch.setattr(target_teacher, "generate_batch", generate)
    monkeypatch.setattr(target_teacher, "_WINDOW", 4)
    in_process(tiny_target, source, tmp_path / "out.jsonl")
    assert reads[0] == 2 * 4 and reads[-1] == COUNT
    assert source.most <= 2 * 8 * 3 // 2 + 2  # two windows


def test_an_open_file_holds_places_not_answers(tmp_path: Path) -> None:
    out, count, text = tmp_path / "out.jsonl", 200, "x" * 20_000
    question = {"role": "user", "content": text}
    record = {"messages": [question, {"role": "assistant", "content": text}], "response_ids": [5] * 50, "batch": 0}
    with RecordLog(out, {}) as log:
        log.append([{"id": str(i), **record} for i in range(count)])
    tracemalloc.start()
    with RecordLog(out, {}) as log:
        held, most = tracemalloc.get_traced_memory()
        assert log.find("7", [question]).answer == text and log.find("no", []) is None
    tracemalloc.stop()
    assert (len(log), log.tokens) == (count, count * 50)
    assert held < 100 * count + 50_000 and most < 20 * len(text)


@pytest.mark.parametrize("kept", [1, 7, 20])
def test_turns_with_an_answer_are_not_asked_again(fake: Any, tmp_path: Path, kept: int) -> None:
    """Their answers are the history of the other turns."""
    straight, out = tmp_path / "straight.jsonl", tmp_path / "out.jsonl"
    by_server(fake(), Source(20), straight)
    by_server(fake(), Source(20), out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:kept]))
    server = fake()
    assert by_server(server, Source(20), out).written == 30
    assert len(server.words) == 30 - kept and records(out) == records(straight)


def test_more_prompts_continue_a_servers_file_and_others_do_not(fake: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    by_server(fake(), Source(4), out)
    server = fake()
    summary = by_server(server, Source(10), out)
    assert (summary.written, summary.skipped) == (15, 0) and len(server.words) == 9
    assert by_server(server, Source(2), out).skipped == 0
    before = out.read_bytes()
    with pytest.raises(MismatchError, match=r"begun with other prompts \('c0/0' was another one\): use another --out"):
        by_server(server, Source(10, "not "), out)
    assert out.read_bytes() == before and len(server.words) == 9


@pytest.mark.parametrize("kills", [1, 4, 9])
def test_windows_of_a_killed_run_equal_those_of_a_straight_one(
    tiny_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    monkeypatch.setattr(target_teacher, "_WINDOW", 2)
    straight, out = tmp_path / "straight.jsonl", tmp_path / "out.jsonl"
    in_process(tiny_target, Source(14), straight)
    append, left = RecordLog.append, [kills]

    def killed(self: RecordLog, batch: list) -> None:
        append(self, batch)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecordLog, "append", killed)
        in_process(tiny_target, Source(14), out)
    before = out.read_bytes()
    for other in (Source(14, "not "), Source(1)):
        with pytest.raises(MismatchError, match=r"begun with other (prompts|settings \(prompts was)"):
            in_process(tiny_target, other, out)
    assert out.read_bytes() == before
    in_process(tiny_target, Source(14), out)
    assert out.read_bytes() == straight.read_bytes()
    meta = [Path(f"{path}.meta.json").read_text() for path in (straight, out)]
    assert meta[0] == meta[1]


def test_ids_that_look_like_repetitions_are_told_apart(fake: Any, tmp_path: Path) -> None:
    rows = [Conversation(id, "f:1", [{"role": "user", "content": str(i)}]) for i, id in enumerate(["a", "a", "a~2"])]
    by_server(fake(), rows, tmp_path / "out.jsonl")
    found = {id: record["messages"][0]["content"] for id, record in records(tmp_path / "out.jsonl").items()}
    assert found == {"a/0": "0", "a~2/0": "1", "a~2~2/0": "2"}


def test_a_bad_line_stops_where_it_is_reached(fake: Any, tmp_path: Path) -> None:
    """What was answered before stays; the same call with a repaired line, or without it, continues."""
    out, good = tmp_path / "out.jsonl", list(Source(9))
    long = Conversation("long", "f.jsonl:99", [{"role": "user", "content": "x" * 600}])
    with pytest.raises(DataError, match=r"f\.jsonl:99: too long"):
        by_server(fake(), [*good, long], out, max_length=500)
    reports: list[str] = []
    options: dict[str, Any] = {"max_length": 500, "on_bad_line": "skip", "report": reports.append}
    summary = by_server(fake(), [*good, long], out, **options)
    assert (summary.written, summary.skipped, len(reports)) == (13, 1, 1)
    with pytest.raises(DataError, match="no prompt to answer"):
        by_server(fake(), [long], tmp_path / "b.jsonl", **options)


def test_rows_are_counted_without_reading_them(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}')
    (tmp_path / "b.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "c.jsonl").write_text("")
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"]}), tmp_path / "d.parquet")
    (tmp_path / "d.jsonl.meta.json").write_text("{}")
    for name in ("a.jsonl", "b.txt", "c.jsonl", "d.parquet", ""):
        rows = list(read_rows(tmp_path / name, pytest.fail, need_answer=False))
        assert count_rows(tmp_path / name) == len(rows)
    (tmp_path / "e.json").write_text("[]")
    assert [count_rows(source) for source in (tmp_path / "e.json", tmp_path, "hf:someone/rows")] == [None] * 3
    assert count_rows(tmp_path / "b.jsonl") is None


def test_the_bar_shows_conversations_and_measures_new_answers(tmp_path: Path, capsys: Any) -> None:
    tally = Tally()
    with RecordLog(tmp_path / "out.jsonl", {}) as log, ConversationBar(tally, log, lambda: 7, enabled=True) as bar:
        tally.done = 5  # held by the file
        bar.show()
        (task,) = bar._bar.tasks
        assert task.completed == 5 and not task.speed
        log.append([{"id": "a", "response_ids": [1, 2], "batch": 0, "prompt_ids": [1]}])
        for tally.done in (6, 7):
            bar.show()
        assert task.completed == 7 and task.speed and task.fields["tokens"] == 2
        bar.counting.join(timeout=10)
        assert task.total == 7
    assert "7/7" in capsys.readouterr().out
