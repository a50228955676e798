"""Fixtures of the tests of data."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fake_server import FakeServer, Handler


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeServer]]:
    """Starts fake servers, with faults that they have first."""
    started: list[FakeServer] = []

    def start(*faults: Callable[[Handler], None], **options: Any) -> FakeServer:
        started.append(FakeServer(*faults, **options))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()
