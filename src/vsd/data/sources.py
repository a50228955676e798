"""The rows of a source: files of conversations, plain or compressed, folders of them, and sets of the Hugging Face hub.

    .jsonl, .jsonl.gz, .jsonl.zst     one row a line
    .json, .json.gz, .json.zst        one list of rows
    .txt, .txt.gz, .txt.zst           one prompt a line
    .parquet, .arrow                  tables
    a folder                          such files, in the order of their names, or a set that `save_to_disk` wrote
    hf:NAME[:SPLIT]                   a data set of the hub, streamed; NAME:CONFIG:SPLIT for one of its configurations

A text file may begin with a byte order mark, and its lines may end as in Windows.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vsd.data.lines import BadLineError, Report
from vsd.errors import DataError

_COMPRESSED = (".gz", ".zst")
_TABLES = (".parquet", ".arrow")
_PIECE = 1 << 20  # bytes that are decompressed at once
_MARK = b"\xef\xbb\xbf"
_KINDS = ".jsonl, .json, .txt, .parquet or .arrow file (text also as .gz or .zst)"


class Row(NamedTuple):
    """One row that is not yet parsed.

    Attributes:
        where: the row's place, "file.jsonl:12".
        name: an id for a row without one.
        raw, parse: `parse(raw)` is the row; it raises BadLineError.
        folder: where relative paths in the row start.
    """

    where: str
    name: str
    raw: Any
    parse: Callable[[Any], Any]
    folder: Path = Path()


def read_rows(source: str | Path, report: Report, *, need_answer: bool) -> Iterator[Row]:
    """All rows of a source.

    Args:
        report: called with one line for every file of a folder that is not read.
        need_answer: refuse files of prompts.

    Raises:
        DataError: no such source, or a file that cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        yield from _folder_rows(path, report, need_answer)
    elif _kind(path):
        yield from _file_rows(path, need_answer)
    elif path.is_file():
        raise DataError(f"{source}: expected a {_KINDS}")
    else:
        yield from _hub_rows(str(source))


def files_of(source: str | Path) -> list[Path] | None:
    """The files that a source is made of; None for one of the Hugging Face hub, or if there is no such file."""
    path = Path(source)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else None


def count_rows(source: str | Path) -> int | None:
    """The number of rows, or None where it is known only after reading them.

    Of .jsonl and .txt files the line breaks are counted, of Parquet the metadata are read.
    """
    path = Path(source)
    files = [file for file in path.iterdir() if _is_data(file)] if path.is_dir() else [path]
    if not all(file.suffix in _COUNTED and file.is_file() for file in files):
        return None
    try:
        return sum(_COUNTED[file.suffix](file) for file in files)
    except (OSError, ValueError):  # whoever reads the rows raises
        return None


def _count_lines(path: Path) -> int:
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            count, last = count + piece.count(b"\n"), piece[-1:]
    return count + (last != b"\n")


def _count_table(path: Path) -> int:
    from pyarrow import parquet  # slow to import

    rows: int = parquet.read_metadata(path).num_rows
    return rows


_COUNTED = {".jsonl": _count_lines, ".txt": _count_lines, ".parquet": _count_table}


def _kind(path: Path) -> str:
    """The suffix that says how a file is read; empty for an unknown one."""
    plain = path.with_suffix("") if path.suffix in _COMPRESSED else path
    known = (".jsonl", ".json", ".txt", *(() if path.suffix in _COMPRESSED else _TABLES))
    return plain.suffix if plain.suffix in known else ""


def _folder_rows(path: Path, report: Report, need_answer: bool) -> Iterator[Row]:
    if (path / "dataset_dict.json").exists():
        raise DataError(f"{path} holds several splits: give the folder of one, such as {path / 'train'}")
    if (path / "state.json").exists() and (path / "dataset_info.json").exists():
        yield from _tabular(path, lambda datasets: datasets.load_from_disk(str(path)))
        return
    found = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    files = [file for file in found if _is_data(file)]
    for file in found:
        if file not in files and not file.name.endswith(".meta.json"):
            report(f"{file}: {'a folder in a folder' if file.is_dir() else f'not a {_KINDS}'}")
    if not files:
        raise DataError(f"{path} holds no {_KINDS}")
    for file in files:
        yield from _file_rows(file, need_answer)


def _is_data(file: Path) -> bool:
    """Whether a file of a folder is read: not the settings of our own output."""
    return (
        file.is_file() and bool(_kind(file)) and not file.name.startswith(".") and not file.name.endswith(".meta.json")
    )


def _file_rows(path: Path, need_answer: bool) -> Iterator[Row]:
    kind = _kind(path)
    if kind == ".txt" and need_answer:
        raise DataError(f"{path} holds prompts without answers: make them with `vsd data regenerate` first")
    if kind in _TABLES:
        return _tabular(path, lambda datasets: _table(datasets, path))
    return _items(path) if kind == ".json" else _lines(path, _prompt if kind == ".txt" else _json)


def _lines(path: Path, parse: Callable[[bytes], Any]) -> Iterator[Row]:
    number = 0
    try:
        for number, line in enumerate(_raw_lines(path), start=1):
            yield Row(f"{path}:{number}", _name(path, number), line.removeprefix(_MARK), parse, path.parent)
    except FileNotFoundError as error:
        raise DataError(f"no file at '{path}'") from error
    except DataError:
        raise
    except Exception as error:  # of the file system or a decompressor: they have no common class
        raise DataError(f"{path}: cannot be read after line {number}: {error}") from error


def _items(path: Path) -> Iterator[Row]:
    """The rows of a JSON list, by number."""
    rows = _list_of(b"".join(row.raw for row in _lines(path, _json)), path)
    for number, row in enumerate(rows, start=1):
        yield Row(f"{path}:item {number}", _name(path, number), row, _as_it_is, path.parent)


def _as_it_is(raw: Any) -> Any:
    return raw


def _list_of(text: bytes, path: Path) -> list[Any]:
    """A JSON list.

    Raises:
        DataError: it is not one.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); a file with one object a line is called .jsonl") from error
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a JSON list of conversations, found {type(value).__name__}")
    return value


def _raw_lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _split(_decompressed(path))
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


def _decompressed(path: Path) -> Iterator[bytes]:
    """Pieces of a .zst file; a stream reader of the package would take a file that is cut off for a whole one."""
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path}: a .zst file is read with the package zstandard: pip install zstandard") from error
    frame = None
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            while piece:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(piece)
                piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the file is cut off")


def _split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of a text that comes in pieces."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _name(path: Path, number: int) -> str:
    return f"{path.name.split('.')[0]}-{number:06d}"


def _table(datasets: Any, path: Path) -> Iterable[Any]:
    """The rows of a Parquet or Arrow file, streamed."""
    if not path.exists():
        raise FileNotFoundError(f"no file at '{path}'")
    rows: Iterable[Any] = datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train", streaming=True)
    return rows


def _tabular(path: Path, load: Callable[[Any], Iterable[Any]]) -> Iterator[Row]:
    import datasets  # slow to import

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised, too
    try:
        for number, row in enumerate(load(datasets), start=1):
            yield Row(f"{path}:{number}", _name(path, number), row, without_nulls, path.parent)
    except Exception as error:  # of a parser: they have no common class
        raise DataError(f"{path}: {_reason(error)}") from error


def _hub_rows(source: str) -> Iterator[Row]:
    """Rows of `hf:NAME[:SPLIT]` or `hf:NAME:CONFIG:SPLIT`, streamed."""
    import datasets  # slow to import

    name, *rest = source.removeprefix("hf:").split(":")
    config, split = (rest[0], rest[1]) if len(rest) == 2 else (None, rest[0] if rest else "train")
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield Row(f"{name}[{split}]:{number}", f"{split}-{number:06d}", row, without_nulls)
    except Exception as error:  # of the hub, the network or a parser: they have no common class
        raise DataError(f"cannot read data set '{name}' (split '{split}'): {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def without_nulls(value: Any) -> Any:
    """A row of a table without its empty fields: tables give every object of a column the keys of all of them."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _text(line: bytes) -> str:
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        raise BadLineError("not UTF-8") from error
    if not text:
        raise BadLineError("empty line")
    return text


def _prompt(line: bytes) -> dict[str, Any]:
    return {"prompt": _text(line)}


def _json(line: bytes) -> Any:
    text = _text(line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        half = "" if line.endswith(b"\n") else "; the file ends within this line"
        raise BadLineError(f"not JSON ({error}){half}") from error
