"""The output file of generation: append-only JSONL that survives being killed.

Batches of records are appended and synced to disk in a fixed order, so whatever was written stays, a torn
last line is cut off on the next start, and every batch before the last one seen is known to be complete. A
sidecar, `OUT.meta.json`, holds the settings: another run may continue the file only if it would have written
the same.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

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

from vsd.errors import VSDError

Record = dict[str, Any]


class Entry(NamedTuple):
    """What is remembered of a record: enough to continue after it."""

    id: str
    batch: int
    question: str
    answer: str
    tokens: int

    @classmethod
    def of(cls, record: Record) -> "Entry":
        """The entry of a record."""
        question, answer = [m["content"] for m in record.get("messages") or [{"content": ""}] * 2][-2:]
        return cls(record["id"], record["batch"], question, answer, len(record["response_ids"]))


class RecordLog:
    """An open output file: `entries` are those of earlier runs, by id; `append` adds a batch for good.

    Raises:
        VSDError: another process writes to it, its settings differ, or it is damaged or not ours.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.path = out
        out.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = out.open("a+b")
        try:
            _lock(self._file, out)
            _check_settings(out, settings, empty=out.stat().st_size == 0)
            self.entries = {entry.id: entry for entry in self._read()}
        except BaseException:
            self._file.close()
            raise
        self.last_batch = max((entry.batch for entry in self.entries.values()), default=-1)  # may be incomplete

    def __enter__(self) -> "RecordLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def append(self, records: Sequence[Record]) -> None:
        """Write the records of one batch; they are on disk when this returns."""
        if records:
            self._file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def _read(self) -> list[Entry]:
        self._file.seek(0)
        entries = []
        for number, line in enumerate(self._file, start=1):
            try:
                entries.append(_parse(line))
            except (ValueError, KeyError, TypeError) as error:
                if self._file.read(1):
                    raise VSDError(f"{self.path}:{number}: damaged line; repair it or use another --out") from error
                self._file.truncate(self._file.tell() - len(line))  # torn by a kill: its batch is redone
        return entries


def _parse(line: bytes) -> Entry:
    if not line.endswith(b"\n"):
        raise ValueError("torn")
    return Entry.of(json.loads(line))


def _lock(file: IO[bytes], out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two runs on one file are not caught there
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise VSDError(f"another run is writing to {out}: wait for it or use another --out") from error


def _check_settings(out: Path, settings: dict[str, Any], *, empty: bool) -> None:
    meta = out.with_name(out.name + ".meta.json")
    if not empty:
        if not meta.exists():
            raise VSDError(f"{out} exists and {meta.name} does not, so it cannot be resumed: use another --out")
        try:
            before = json.loads(meta.read_text())
        except ValueError as error:
            raise VSDError(f"{meta} is damaged, so {out.name} cannot be resumed: use another --out") from error
        changed = [
            f"{key} was {before.get(key)}, is {settings.get(key)}"
            for key in sorted({*before, *settings})
            if before.get(key) != settings.get(key)
        ]
        if changed:
            raise VSDError(f"{out} was begun with other settings ({'; '.join(changed)}): use another --out")
        return
    draft = meta.with_name(meta.name + ".tmp")
    draft.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(draft, meta)


class _TokenRate(ProgressColumn):
    """Answer tokens a second since this run began."""

    def render(self, task: Task) -> Text:
        seconds = task.elapsed or 0.0
        return Text(f"{task.fields['tokens'] / seconds:.0f} tok/s" if seconds else "")


def progress_bar(*, enabled: bool) -> Progress:
    """Bar, count, elapsed, ETA and tokens a second; tasks carry the field `tokens`."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    return Progress(
        *columns,
        TextColumn("ETA"),
        TimeRemainingColumn(),
        _TokenRate(),
        disable=not enabled,
        speed_estimate_period=3600,
    )
