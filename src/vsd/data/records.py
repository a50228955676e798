"""The output file of generation: append-only JSONL that a killed process leaves usable.

Batches of records are appended and synced to disk in a fixed order. So every complete line is kept, a torn last line is
cut off on the next start, and every batch before the last one in the file is complete. The file `OUT.meta.json` holds
the settings: another run may continue OUT only with the same settings.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from vsd.data.generate import Answer
from vsd.data.pictures import as_json, text_of
from vsd.data.questions import Question
from vsd.data.template import answer_text
from vsd.errors import DataError, MismatchError
from vsd.files import lock, write_text, writing
from vsd.targets.info import TargetInfo

Record = dict[str, Any]


class GenerationSettings(NamedTuple):
    """How answers are sampled."""

    max_new_tokens: int
    temperature: float
    seed: int


class Summary(NamedTuple):
    """Answers in the file, user turns and conversations that are not, and the answer tokens in the file."""

    written: int
    skipped: int
    tokens: int


class Entry(NamedTuple):
    """The part of a record that is kept in memory: enough to continue after it."""

    id: str
    batch: int
    question: str
    answer: str
    tokens: int

    @classmethod
    def of(cls, record: Record) -> "Entry":
        """The entry of a record."""
        question, answer = [text_of(m["content"]) for m in record.get("messages") or [{"content": ""}] * 2][-2:]
        return cls(record["id"], record["batch"], question, answer, len(record["response_ids"]))


class RecordLog:
    """An open output file.

    Attributes:
        entries: of all records in the file, by id.
        tokens: answer tokens in the file.
        last_batch: the largest batch number at opening, -1 for an empty file; this batch may be incomplete.

    Raises:
        ConfigurationError: another process writes to the file.
        DataError: the file is damaged.
        FileError: it cannot be written.
        MismatchError: the file was not made by this class, or with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.path = out
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = out.open("a+b")
        try:
            lock(self._file, f"another run is writing to {out}: wait for it or use another --out")
            _check_settings(out, settings, empty=out.stat().st_size == 0)
            self.entries = {entry.id: entry for entry in self._read()}
        except BaseException:
            self._file.close()
            raise
        self.tokens = sum(entry.tokens for entry in self.entries.values())
        self.last_batch = max((entry.batch for entry in self.entries.values()), default=-1)

    def __enter__(self) -> "RecordLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with writing(self.path):  # what a full disk refused before is tried once more
            self._file.close()

    def holds(self, batch: int, questions: Sequence[Question]) -> bool:
        """Whether the file has the batch whole: all its answers, or all but the empty ones."""
        return batch < self.last_batch or all(question.id in self.entries for question in questions)

    def append(self, records: Sequence[Record]) -> None:
        """Write the records of one batch; they are on disk when this returns."""
        if records:
            with writing(self.path):
                self._file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())
                self._file.flush()
                os.fsync(self._file.fileno())
        for record in records:
            self.entries[record["id"]] = entry = Entry.of(record)
            self.tokens += entry.tokens

    def _read(self) -> list[Entry]:
        self._file.seek(0)
        entries = []
        for number, line in enumerate(self._file, start=1):
            try:
                entries.append(_parse(line))
            except (ValueError, KeyError, TypeError) as error:
                if self._file.read(1):
                    raise DataError(f"{self.path}:{number}: damaged line; repair it or use another --out") from error
                self._file.truncate(self._file.tell() - len(line))  # torn by a kill: its batch is made again
        return entries


def record_of(
    info: TargetInfo, question: Question, answer: Answer, batch: int, settings: GenerationSettings
) -> Record | None:
    """The line for one answer; None for an answer without text, which has no drafted positions."""
    text = answer_text(info.tokenizer, answer.ids)
    if not text.strip() or len(answer.ids) < 2:
        return None
    messages = [*question.messages, {"role": "assistant", "content": text}] if question.messages else None
    return {
        "id": question.id,
        **({"messages": as_json(messages)} if messages else {}),
        "prompt_ids": question.inputs.ids,
        "response_ids": answer.ids,
        "finish": answer.finish,
        "temperature": settings.temperature,
        "batch": batch,
    }


def _parse(line: bytes) -> Entry:
    if not line.endswith(b"\n"):
        raise ValueError("torn")
    return Entry.of(json.loads(line))


def _check_settings(out: Path, settings: dict[str, Any], *, empty: bool) -> None:
    """Compare `settings` with those that `out` was begun with; store them if `out` is empty."""
    meta = out.with_name(out.name + ".meta.json")
    if empty:
        write_text(meta, json.dumps(settings, indent=1) + "\n")
        return
    before = _read_settings(out, meta)
    changed = [
        f"{key} was {before.get(key)}, is {settings.get(key)}"
        for key in sorted({*before, *settings})
        if before.get(key) != settings.get(key)
    ]
    if changed:
        raise MismatchError(f"{out} was begun with other settings ({'; '.join(changed)}): use another --out")


def _read_settings(out: Path, meta: Path) -> dict[str, Any]:
    if not meta.exists():
        raise MismatchError(f"{out} exists and {meta.name} does not, so it cannot be resumed: use another --out")
    try:
        found: dict[str, Any] = json.loads(meta.read_text())
    except ValueError as error:
        raise DataError(f"{meta} is damaged, so {out.name} cannot be resumed: use another --out") from error
    return found
