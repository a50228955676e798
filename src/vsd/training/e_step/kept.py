"""Continuations of texts between epochs: in memory, and beyond a limit in files of a temporary folder."""

import shutil
import tempfile
import weakref
from pathlib import Path

from safetensors.torch import load_file, save_file

from vsd.paths import Continuations

_MEMORY = 4 << 30  # bytes that a process keeps in memory
_LEFT = 1 << 30  # bytes that stay free on the disk


class Kept:
    """Continuations by example, on the CPU. The folder ($TMPDIR decides where) goes with the object.

    What neither memory nor disk has room for is not kept, and a resumed run begins with nothing. Both draw anew, and
    the same: draws depend on seed, text and epoch alone. So it does not matter which process has had a text.
    """

    def __init__(self) -> None:
        self.memory, self.files, self._bytes = dict[int, Continuations](), dict[int, Path](), 0
        self._folder: Path | None = None

    def __contains__(self, example: int) -> bool:
        """Whether those of an example are kept."""
        return example in self.memory or example in self.files

    def get(self, example: int) -> Continuations | None:
        """Those of an example, if they are kept."""
        if example in self.files:
            tensors = load_file(self.files[example])
            return Continuations(*(tensors[name] for name in Continuations._fields))
        return self.memory.get(example)

    def add(self, example: int, found: Continuations) -> None:
        """Keep those of an example."""
        size = sum(field.nbytes for field in found)
        if self._bytes + size <= _MEMORY:
            self.memory[example] = found
            self._bytes += size
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="vsd-continuations-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        if shutil.disk_usage(self._folder).free > size + _LEFT:
            path = self._folder / f"{example}.safetensors"
            save_file({name: field.contiguous() for name, field in found._asdict().items()}, path)
            self.files[example] = path
