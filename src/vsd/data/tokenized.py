"""Training text as token ids. A large text is encoded once for all processes and runs, and mapped from a cache.

Its folder in the cache directory is named by a digest of its files, of the tokenizer with its chat template, of the
options and of this package's code. A small text, one with images and one of the Hugging Face hub are encoded by every
process for itself.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers

from vsd.data.blocks import Block, blocks_of
from vsd.data.examples import load_examples
from vsd.data.lines import LOG, OnBadLine, Report
from vsd.data.sequences import FILES, Examples
from vsd.data.sources import files_of
from vsd.files import made_once, write_text
from vsd.targets import TargetInfo
from vsd.targets.load import cache_directory

_META = "text.json"  # the skipped lines, so that every run reports them
_SMALL = 1 << 22  # bytes of files that are encoded within seconds
_PIECE = 1 << 22  # bytes of a file that are hashed at once


def training_text(
    sources: Sequence[str | Path],
    info: TargetInfo,
    max_length: int,
    on_bad_line: OnBadLine = "fatal",
    report: Report | None = None,
    *,
    download_images: bool = False,
) -> Examples:
    """The training sequences of all sources.

    Args:
        max_length: of a sequence, in tokens; a longer one is a bad line.
        report: called with a line for every skipped one, whether the text is encoded now or was before.
        download_images: as in `read_conversations`.

    Raises:
        DataError: a bad line, when fatal; a source without a usable conversation.
        TargetError: the tokenizer has no chat template, or is not a fast one.
        FileError: the cache directory cannot be written.
    """
    report, tokenizer, options = report or LOG.warning, info.tokenizer, (max_length, on_bad_line)
    listed = [files_of(source) for source in sources]
    files = [file for some in listed for file in some or []]
    small = sum(file.stat().st_size for file in files) < _SMALL
    if small or None in listed or info.images is not None or not tokenizer.is_fast:
        shown: dict[str, Any] = {"images": info.images, "download_images": download_images}
        parts = (load_examples(source, tokenizer, *options, report, **shown) for source in sources)
        return Examples.of(example for part in parts for example in part)
    folder = cache_directory() / "text" / _digest(files, tokenizer, options)

    def encoded() -> Iterable[Block]:
        for source in sources:
            yield from blocks_of(source, tokenizer, *options)

    made_once(folder, lambda half: _write(half, encoded()))
    for line in json.loads((folder / _META).read_text()):
        report(line)
    return Examples.mapped(folder)


def _digest(files: Iterable[Path], tokenizer: Any, options: tuple[Any, ...]) -> str:
    """The name of a text's folder."""
    template = str(tokenizer.chat_template)
    today = time.strftime("%Y-%m-%d") if "strftime_now" in template else ""
    versions = transformers.__version__, _code()
    settings = [*options, template, sorted(tokenizer.all_special_ids), today, *versions]
    found = hashlib.sha256(json.dumps(settings).encode() + tokenizer.backend_tokenizer.to_str().encode())
    for path in files:
        found.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                found.update(piece)
    return found.hexdigest()[:16]


def _code() -> str:
    """Changes with the modules of this package."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _write(folder: Path, blocks: Iterable[Block]) -> None:
    """Append the arrays of all blocks to the files of a folder."""
    skipped, tokens = list[str](), 0
    opened = [(folder / name).open("wb") for name in FILES]
    try:
        for found, bad in blocks:
            found.spans[:, 0] += tokens
            tokens += len(found.ids)
            for file, array in zip(opened, (found.ids, found.drafted, found.spans)):
                array.tofile(file)
            skipped += bad
    finally:
        for file in opened:
            file.close()
    write_text(folder / _META, json.dumps(skipped))
