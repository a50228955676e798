"""The progress bar of text generation."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from vsd.data.questions import Tally
from vsd.data.records import RecordLog
from vsd.progress import Progress


class _TokenRate(ProgressColumn):
    """Answer tokens per second since this run began."""

    def render(self, task: Task) -> Text:
        seconds = task.elapsed or 0.0
        return Text(f"{task.fields['tokens'] / seconds:.0f} tok/s" if seconds else "")


def progress_bar(*, enabled: bool) -> Progress:
    """Bar, count, elapsed time, remaining time and tokens per second; tasks carry the field `tokens`."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    return Progress(
        *columns,
        TextColumn("ETA"),
        TimeRemainingColumn(),
        _TokenRate(),
        disable=not enabled,
    )


class ConversationBar:
    """The conversations of a run that are done. The total is shown when `count` has found it, in a thread of its own.

    Conversations that the file held at the start are no measure of speed, so the clock starts behind them.
    """

    def __init__(self, tally: Tally, log: RecordLog, count: Callable[[], int | None] | None, *, enabled: bool) -> None:
        self._tally, self._log, self._before = tally, log, log.tokens
        self._bar, self._begun = progress_bar(enabled=enabled), float("-inf")
        self._task = self._bar.add_task("regenerate", total=None, tokens=0)
        if enabled and count is not None:
            self.counting = threading.Thread(target=lambda: self._bar.update(self._task, total=count()), daemon=True)
            self.counting.start()

    def __enter__(self) -> "ConversationBar":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.update(self._task, completed=self._tally.done)
        self._bar.stop()

    def show(self) -> None:
        """Show how far the run is."""
        done, tokens = self._tally.done, self._log.tokens - self._before
        if tokens:
            self._bar.update(self._task, completed=done, tokens=tokens)
        elif time.monotonic() - self._begun > 1:  # a reset draws the bar, and there may be millions of conversations
            self._begun = time.monotonic()
            self._bar.reset(self._task, completed=done, tokens=0)
