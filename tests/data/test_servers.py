"""Several servers share the questions: each is asked, and one that fails stops nothing."""

import json
import logging
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fake_server import INFO, FakeServer, Handler
from vsd.data import Conversation, Server, Servers, ServerTeacher, regenerate
from vsd.data import server as client
from vsd.errors import ConfigurationError, MismatchError, TargetError

COUNT = 40


class Endless(list[Callable[[Handler], None]]):
    """A list of faults that never ends."""

    def pop(self, *_: Any) -> Callable[[Handler], None]:
        return self[0]


def busy(handler: Handler) -> None:
    handler.json(503, {"error": "busy"})


def dropped(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def run(servers: list[FakeServer], out: Path, rate: float | None = None, count: int = COUNT) -> None:
    """Every conversation is answered once."""
    asked = [Conversation(f"c{i}", f"f:{i}", [{"role": "user", "content": str(i)}]) for i in range(count)]
    teacher = ServerTeacher(Servers([Server(one.url, "tiny") for one in servers], rate), INFO, 6)
    summary = regenerate(teacher, asked, out, max_new_tokens=40, progress=False)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(record["id"] for record in found) == sorted(f"c{i}/0" for i in range(count))
    assert all(record["messages"][1]["content"] == f"answer to {record['id'][1:-2]}" for record in found)
    assert summary.written == count == sum(len(one.asked) for one in servers)  # none was asked twice


def test_requests_are_spread(fake: Any, tmp_path: Path) -> None:
    servers = [fake(delay=0.05) for _ in range(3)]
    run(servers, tmp_path / "out.jsonl")
    assert all(len(one.asked) > COUNT // 6 and one.most < 6 for one in servers)


def test_a_slow_server_gets_fewer(fake: Any, tmp_path: Path) -> None:
    slow, fast = fake(delay=0.4), fake(delay=0.02)
    run([slow, fast], tmp_path / "out.jsonl")
    assert 0 < len(slow.asked) < len(fast.asked) / 2


@pytest.mark.parametrize("fault", [busy, dropped])
def test_a_server_that_fails_for_a_while_is_asked_again(fake: Any, tmp_path: Path, fault: Any) -> None:
    failing, sound = fake(*[fault] * 4), fake(delay=0.4)
    run([failing, sound], tmp_path / "out.jsonl")
    assert len(failing.asked) > 0 and not failing.faults


def test_a_server_that_is_down_is_tried_by_one_request_at_a_time(fake: Any, tmp_path: Path) -> None:
    def hanging(handler: Handler) -> None:
        time.sleep(0.2)
        busy(handler)

    failing, sound = fake(), fake(delay=0.05)
    failing.faults = Endless([hanging])
    run([failing, sound], tmp_path / "out.jsonl", count=90)
    times = sorted(failing.times)[3:]  # half of the six that are sent at first go to it
    assert len(times) > 1 and all(later - one > 0.15 for one, later in pairwise(times))


def test_a_server_that_stays_down_is_left_out(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client, "_RETRY_SECONDS", 1.0)  # also of a request: longer than a busy machine may pause
    gone, sound = fake(), fake(delay=0.15)
    gone.faults = Endless([busy])
    with caplog.at_level(logging.WARNING):
        run([gone, sound], tmp_path / "out.jsonl", count=120)
    left_out = [line for line in caplog.messages if "left out" in line]
    assert len(left_out) == 1 and left_out[0].startswith(
        f"{gone.url} has failed for too long and is left out: status 503"
    )
    assert max(sound.times) - max(gone.times) > 0.3, "it is not asked any more"


def test_all_servers_down(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_RETRY_SECONDS", 0.3)
    servers = [fake(), fake()]
    for one in servers:
        one.faults = Endless([busy])
    with pytest.raises(TargetError, match=r"127.*fails: status 503: busy; run the same command again when the server"):
        run(servers, tmp_path / "out.jsonl")
    for one in servers:
        one.faults = []
    run(servers, tmp_path / "out.jsonl")


def test_servers_must_serve_the_same_model(fake: Any, tmp_path: Path) -> None:
    one, other = fake(), fake()
    other.models = ("else",)
    with pytest.raises(MismatchError) as refused:
        run([one, other], tmp_path / "out.jsonl")
    assert str(refused.value) == f"all servers must serve 'tiny': {one.url} has tiny, other; {other.url} has else"
    assert not one.asked
    servers = Servers([Server(one.url, "tiny"), Server("http://127.0.0.1:9", "tiny")])
    with closing(servers), pytest.raises(TargetError, match=r"127\.0\.0\.1:9 fails: .*refused"):
        servers.check()


def test_what_a_server_asks_for_holds_when_all_are_down(fake: Any, tmp_path: Path) -> None:
    wait = lambda handler: handler.json(429, {}, Retry_After="0.7")  # noqa: E731
    servers = [fake(wait), fake(wait)]
    run(servers, tmp_path / "out.jsonl", count=2)
    for one in servers:
        assert all(later - one.times[0] > 0.6 for later in one.times[1:])


def test_the_rate_is_that_of_all_together(fake: Any, tmp_path: Path) -> None:
    servers = [fake(), fake()]
    run(servers, tmp_path / "out.jsonl", rate=50.0)
    times = sorted(servers[0].times + servers[1].times)
    assert times[-1] - times[0] > 0.9 * (len(times) - 1) / 50
    with pytest.raises(ConfigurationError, match="requests per second must be positive"):
        Servers([Server(servers[0].url, "tiny")], 0)
