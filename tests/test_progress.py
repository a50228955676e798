"""Progress of long work in a log file."""

import io

import pytest
from rich.console import Console

from vsd import progress


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The log that bars write to, a line at every change."""
    file = io.StringIO()
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr("rich.progress.get_console", lambda: Console(file=file, width=60))
    return file


def test_a_log_file_gets_a_line_for_every_part_and_one_at_the_end(log: io.StringIO) -> None:
    assert list(progress.track([5, 6, 7], "shards")) == [5, 6, 7]
    lines = log.getvalue().splitlines()
    assert [f" {share}% " in line for share, line in zip((33, 67, 100), lines)] == [True] * 3
    assert len(lines) == 3 and all(line.startswith("shards") for line in lines)


def test_lines_are_half_a_minute_apart(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 30.0)
    list(progress.track(range(100), "shards"))
    assert len(log.getvalue().splitlines()) == 1


def test_disabled_bars_and_bars_of_nothing_print_nothing(log: io.StringIO) -> None:
    list(progress.track(range(3), "shards", enabled=False))
    list(progress.track([], "shards"))
    assert not log.getvalue()
