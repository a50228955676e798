"""The output file of generation: append-only JSONL that a killed process leaves usable.

Batches of records are appended and synced to disk in a fixed order. So every complete line is kept, a torn last line is
cut off on the next start, and every batch before the last one in the file is complete. The file `OUT.meta.json` holds
the settings: another run may continue OUT only with the same settings. Memory holds the place of each record, not the
record.
"""

import json
import os
from collections.abc import Iterator, Sequence
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
    """Answers in the file, user turns of this run without one, and the answer tokens and cut answers in the file."""

    written: int
    skipped: int
    tokens: int
    cut: int


class Entry(NamedTuple):
    """The part of a record that is needed to continue after it."""

    id: str
    batch: int
    question: str
    answer: str
    tokens: int
    cut: bool

    @classmethod
    def of(cls, record: Record) -> "Entry":
        """The entry of a record."""
        question, answer = [text_of(m["content"]) for m in record.get("messages") or [{"content": ""}] * 2][-2:]
        return cls(
            record["id"],
            record["batch"],
            question,
            answer,
            len(record["response_ids"]),
            record.get("finish") == "length",
        )


class RecordLog:
    """An open output file: its length is the number of its records, `id in log` whether it has an answer.

    Attributes:
        tokens: answer tokens in the file.
        cut: answers in the file that reached the limit of new tokens.
        last_batch: the largest batch number at opening, -1 for an empty file; this batch may be incomplete.

    Raises:
        ConfigurationError: another process writes to the file.
        DataError: the file is damaged.
        FileError: it cannot be written.
        MismatchError: the file was not made by this class, or with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.path, self._settings = out, settings
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = out.open("a+b")
        self._places, self.tokens, self.cut, self.last_batch = dict[str, int](), 0, 0, -1
        try:
            lock(self._file, f"another run is writing to {out}: wait for it or use another --out")
            self._noted = _check_settings(out, settings, empty=out.stat().st_size == 0)
            for place, entry in self._read():
                self._add(entry, place)
                self.last_batch = max(self.last_batch, entry.batch)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "RecordLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with writing(self.path):  # what a full disk refused before is tried once more
            self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, id: str) -> bool:
        return id in self._places

    def find(self, id: str, prompt: list[Any]) -> Entry | None:
        """The answer that the file has to a prompt, given as messages or token ids.

        Raises:
            MismatchError: the record with this id answers another prompt.
        """
        place = self._places.get(id)
        if place is None:
            return None
        self._file.seek(place)
        record = json.loads(self._file.readline())
        answered = record["messages"][:-1] if "messages" in record else record["prompt_ids"]
        if answered != as_json(prompt):
            raise MismatchError(f"{self.path} was begun with other prompts ('{id}' was another one): use another --out")
        return Entry.of(record)

    def holds(self, batch: int, questions: Sequence[Question]) -> bool:
        """Whether the file has the batch whole: all its answers, or all but the empty ones."""
        return batch < self.last_batch or all(question.id in self for question in questions)

    def entries(self) -> list[Entry]:
        """The entries of all records, in the order of the file."""
        return [entry for _, entry in self._read()]

    def expect(self, count: int, digest: str, *, last: bool) -> None:
        """Note which prompts are asked next, before they are: those up to the first `count`, whose digest is given.

        A run that is continued passes over prompts until it has as many as were noted, and compares.

        Args:
            last: there are no further prompts.

        Raises:
            MismatchError: the prompts are not those noted.
        """
        before, now = self._noted, [count, digest]
        if before is not None and count < before[0] and not last:
            return
        if before not in (None, now):
            raise _mismatch(self.path, [f"prompts was {before}, is {now}"])
        self._noted = None
        _write_settings(self.path, {**self._settings, "prompts": now})

    def append(self, records: Sequence[Record]) -> None:
        """Write the records of one batch; they are on disk when this returns."""
        if not records:
            return
        lines = [(json.dumps(record, ensure_ascii=False) + "\n").encode() for record in records]
        with writing(self.path):
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        for record, line in zip(records, lines, strict=True):
            self._add(Entry.of(record), place)
            place += len(line)

    def _add(self, entry: Entry, place: int) -> None:
        self._places[entry.id] = place
        self.tokens += entry.tokens
        self.cut += entry.cut

    def _read(self) -> Iterator[tuple[int, Entry]]:
        """Every record's place and entry."""
        place = self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            try:
                entry = _parse(line)
            except (ValueError, KeyError, TypeError) as error:
                if self._file.read(1):
                    raise DataError(f"{self.path}:{number}: damaged line; repair it or use another --out") from error
                self._file.truncate(place)  # torn by a kill: its batch is made again
                return
            yield place, entry
            place += len(line)


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


def _check_settings(out: Path, settings: dict[str, Any], *, empty: bool) -> list[Any] | None:
    """Compare `settings` with those that `out` was begun with, and store them if `out` is empty.

    Returns:
        The number of prompts that `expect` noted last, and their digest.
    """
    if empty:
        _write_settings(out, settings)
        return None
    before = _read_settings(out, _meta(out))
    noted = before.pop("prompts", None)
    changed = [
        f"{key} was {before.get(key)}, is {settings.get(key)}"
        for key in sorted({*before, *settings})
        if before.get(key) != settings.get(key)
    ]
    if changed:
        raise _mismatch(out, changed)
    return [0, noted] if isinstance(noted, str) else noted  # vsd 0.2 noted a digest of all prompts


def _mismatch(out: Path, changed: list[str]) -> MismatchError:
    return MismatchError(f"{out} was begun with other settings ({'; '.join(changed)}): use another --out")


def _meta(out: Path) -> Path:
    return out.with_name(out.name + ".meta.json")


def _write_settings(out: Path, settings: dict[str, Any]) -> None:
    write_text(_meta(out), json.dumps(settings, indent=1) + "\n")


def _read_settings(out: Path, meta: Path) -> dict[str, Any]:
    if not meta.exists():
        raise MismatchError(f"{out} exists and {meta.name} does not, so it cannot be resumed: use another --out")
    try:
        found: dict[str, Any] = json.loads(meta.read_text())
    except ValueError as error:
        raise DataError(f"{meta} is damaged, so {out.name} cannot be resumed: use another --out") from error
    return found
