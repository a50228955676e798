"""Progress of long work: a bar on a terminal, lines in a log file."""

import time
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from rich.progress import Progress as Bar
from rich.progress import ProgressColumn, TaskID

T = TypeVar("T")

SECONDS = 30.0  # between two lines


class Progress(Bar):
    """Rich's progress bar; where the output is no terminal, a part that ends prints a line, at most twice a minute."""

    _printed = float("inf")  # when: never before the start

    def __init__(self, *columns: str | ProgressColumn, **options: Any) -> None:
        super().__init__(*columns, **{"speed_estimate_period": 3600.0, **options})  # a part may take minutes

    def start(self) -> None:
        """Show the bar, or begin to count the seconds to the first line."""
        super().start()
        self._printed = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """See `rich.progress.Progress.advance`."""
        super().advance(task_id, advance)
        self._print()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """See `rich.progress.Progress.update`."""
        super().update(task_id, **changes)
        self._print()

    def _print(self) -> None:
        silent = self.disable or self.finished or self.console.is_terminal or self.console.is_jupyter
        if not silent and time.monotonic() - self._printed >= SECONDS:
            self._printed = time.monotonic()
            self.console.print(self.get_renderable())


def track(items: Sequence[T], description: str, *, enabled: bool = True) -> Iterable[T]:
    """Iterate, and show how many items are done; of no items nothing."""
    with Progress(disable=not enabled or not items) as bar:
        task = bar.add_task(description, total=len(items))
        for item in items:
            yield item
            bar.advance(task)
