"""What happens with a line that cannot be used: it is an error, or it is reported and skipped."""

import logging
from collections.abc import Callable
from typing import Literal

from vsd.errors import DataError

OnBadLine = Literal["fatal", "skip"]
Report = Callable[[str], None]

LOG = logging.getLogger("vsd.data")


class BadLineError(DataError):
    """A line that cannot be used. The message names the reason; the reader of the file adds the place."""


def handle_bad_line(message: str, on_bad_line: OnBadLine, report: Report | None) -> None:
    """Raise DataError, or report the line as skipped."""
    if on_bad_line == "fatal":
        raise DataError(message)
    (report or LOG.warning)(message)
