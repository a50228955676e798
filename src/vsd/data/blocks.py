"""The rows of a source, encoded in blocks on all cores."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rich.progress import TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from vsd.data.chat import conversations_of
from vsd.data.examples import encode_all
from vsd.data.lines import OnBadLine
from vsd.data.sequences import Examples
from vsd.data.sources import Row, read_rows
from vsd.errors import DataError
from vsd.progress import Progress

_ROWS = 256  # of a block
_AHEAD = 4  # blocks of a process that wait to be encoded


class Block(NamedTuple):
    """Some rows, encoded: sequences, and a line for every skipped row."""

    examples: Examples
    skipped: list[str]


_Work = Callable[[list[Row]], Block]
_work: _Work  # of a worker process


def blocks_of(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, max_length: int, on_bad_line: OnBadLine
) -> Iterator[Block]:
    """All rows of a source, in their order.

    Raises:
        DataError, TargetError: as `vsd.data.examples.encoded`.
    """
    notes: list[str] = []  # about files of a folder
    rows = iter(read_rows(source, notes.append, need_answer=True))
    work = partial(encode_block, tokenizer=tokenizer, max_length=max_length, on_bad_line=on_bad_line)
    usable = 0
    for block in _worked(work, _in_blocks(rows)):
        usable += len(block.examples)
        yield block._replace(skipped=[*notes, *block.skipped])
        notes.clear()
    if not usable:
        raise DataError(f"{source} holds no usable conversation")


def encode_block(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, on_bad_line: OnBadLine) -> Block:
    """Some rows.

    Raises:
        DataError: a bad line, when fatal.
    """
    skipped: list[str] = []
    conversations = conversations_of(rows, on_bad_line, skipped.append, need_answer=True, download_images=False)
    found = encode_all(conversations, tokenizer, max_length, on_bad_line, skipped.append)
    return Block(Examples.of(example for _, examples in found for example in examples), skipped)


def _in_blocks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while block := list(islice(rows, _ROWS)):
        yield block


def _worked(work: _Work, blocks: Iterator[list[Row]]) -> Iterator[Block]:
    """`work` on every block, in order, a few blocks ahead of the one that is taken.

    A process is given `work` once: the tokenizer in it takes longer to copy than a block to encode.
    """
    spawn = multiprocessing.get_context("spawn")
    with _bar() as bar, ProcessPoolExecutor(cores(), spawn, _begin, (work,)) as pool:
        task = bar.add_task("conversations encoded", total=None)
        waiting = deque(pool.submit(_in_worker, rows) for rows in islice(blocks, _AHEAD * cores()))
        try:
            while waiting:
                yield waiting.popleft().result()
                bar.advance(task, _ROWS)
                waiting.extend(pool.submit(_in_worker, rows) for rows in islice(blocks, 1))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin(work: _Work) -> None:
    global _work
    _work = work


def _in_worker(rows: list[Row]) -> Block:
    return _work(rows)


def _bar() -> Progress:
    return Progress(TextColumn("{task.completed} {task.description}"), TimeElapsedColumn())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
