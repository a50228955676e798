"""Files that others can rely on: written whole, by one process at a time, and with errors that say what to do."""

import errno
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from vsd.errors import ConfigurationError, FileError

_AGAIN = "free space, then run the same command again"
_PERMISSION = "check its permissions, or give another path"
_REMEDIES = {
    errno.ENOSPC: _AGAIN,
    errno.EDQUOT: _AGAIN,
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), then run the same command again",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.EISDIR: "it is a folder: give the path of a file",
    errno.ENOTDIR: "a part of the path is a file: give a folder",
    errno.EEXIST: "it is a file: give the path of a folder",
    errno.ENOTEMPTY: "it is not empty: give another folder",
    errno.ENOENT: "check the path",
}


def file_error(error: OSError, path: str | Path | None = None) -> str:
    """What a file system refuses, where, and the remedy, on one line."""
    where = path or error.filename
    reason = error.strerror or " ".join(str(error).split())[:300] or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "check the path and the disk, then run the same command again")
    return f"{reason}{f': {str(where)!r}' if where else ''}: {remedy}"


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns errors of the file system, of safetensors and of `torch.save` into FileError.

    Raises:
        FileError: `path` cannot be written.
    """
    try:
        yield
    except BrokenPipeError:  # of the terminal
        raise
    except OSError as error:
        raise FileError(file_error(error, error.filename or path)) from error
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise FileError(file_error(OSError(int(code[1]), os.strerror(int(code[1]))), path)) from error
    except RuntimeError as error:
        if not re.search("PytorchStreamWriter|unexpected pos", str(error)):  # of `torch.save`
            raise
        raise FileError(f"cannot write to '{path}', as on a full disk: {_AGAIN}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole; its folder is created. A kill leaves at most NAME.tmp, which the next write replaces.

    Raises:
        FileError: it cannot be written.
    """
    half = path.with_name(f"{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            half.write_text(text)
            with suppress(FileNotFoundError):  # another process that writes the same was faster
                os.replace(half, path)
        except OSError:
            with suppress(OSError):
                half.unlink()
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `path`, which may be an empty folder, when the block ends without an error.

    Raises:
        FileError: it cannot be written; nothing is left then.
    """
    half = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        half.mkdir()
        try:
            yield half
            os.replace(half, path)
        finally:
            shutil.rmtree(half, ignore_errors=True)


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder, written on first use by `make`; it appears only when it is complete.

    Of several processes one writes it, and the others wait.

    Raises:
        FileError: it cannot be written.
    """
    if folder.exists():
        return folder
    half = folder.with_name(f"{folder.name}.{platform.node()}.part")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with gated(folder):
        try:
            if not folder.exists():
                shutil.rmtree(half, ignore_errors=True)  # of a process that was killed
                half.mkdir()
                make(half)
                os.replace(half, folder)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return folder


def lock(file: IO[Any] | int, refusal: str | None = None) -> None:
    """Hold an open file or folder for this process, until it is closed or the process ends.

    Args:
        refusal: the message if another process holds it; None waits for it.

    Raises:
        ConfigurationError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two processes that write one file are not noticed there
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal is not None else 0))
    except BlockingIOError as error:
        raise ConfigurationError(str(refusal)) from error
    except OSError:  # a file system without locks
        return


@contextmanager
def gated(path: Path) -> Iterator[None]:
    """Hold a path that several processes want to make, by the lock of `gate_of(path)`; others wait.

    The lock's file is deleted when the block ends without an error: whoever waits for it, or makes another, finds the
    path. A process that was killed holds it no more.

    Raises:
        FileError: the lock's file cannot be written.
    """
    gate = gate_of(path)
    with writing(path), gate.open("ab") as file:
        lock(file)
        yield
        gate.unlink(missing_ok=True)


def gate_of(path: Path) -> Path:
    """The file whose lock a process holds while it makes `path`."""
    return path.with_name(f"{path.name}.lock")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made, for one run.

    Raises:
        ConfigurationError: another run holds it.
        FileError: the folder cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
    try:
        lock(opened, f"another run is writing to '{folder}': wait for it, or give another folder")
        yield
    finally:
        os.close(opened)
