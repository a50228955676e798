"""The progress bar of text generation."""

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


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
        speed_estimate_period=3600,
    )
