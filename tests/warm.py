"""Processes that start within milliseconds: they are forked from one that has imported everything."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

IMPORTED = ["hypothesis", "pytest", "vsd.cli", "vsd.training.job", "vsd.data", "vsd.export", "tiny_run"]


def start(function: Callable[..., object], *arguments: object, log: Path) -> ForkServerProcess:
    """Run a function of a module in a process of its own, with its output in a file."""
    process = _context().Process(target=_run, args=(log, function, *arguments))
    process.start()
    return process


@cache
def _context() -> ForkServerContext:
    """The process to fork from; it finds modules where this one does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


def _run(log: Path, function: Callable[..., object], *arguments: object) -> None:
    gc.freeze()
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    function(*arguments)
