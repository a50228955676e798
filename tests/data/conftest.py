"""Fixtures of the tests of data."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fake_server import FakeServer
from vsd.data import server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of clients between attempts."""
    monkeypatch.setattr(server, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(server, "_LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(server, "_RETRY_SECONDS", 5.0)
    monkeypatch.setattr(server, "_FIRST_RETRY_SECONDS", 0.2)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def fake() -> Iterator[Callable[..., Any]]:
    """Starts fake servers of a kind, with its arguments: a `FakeServer` with the faults that it has first."""
    started: list[FakeServer] = []

    def start(*arguments: Any, kind: type[FakeServer] = FakeServer, **options: Any) -> FakeServer:
        started.append(kind(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.shutdown()
        one.server_close()
