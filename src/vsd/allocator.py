"""Linux CPUs: let glibc keep freed buffers instead of giving them back to the kernel after every operation.

By default every tensor above 32 MB is a fresh mapping of zeroed pages; keeping them makes element-wise work two to
three times faster. It is what `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` do, without having to export them.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Set both thresholds as high as they go; False where the C library has no `mallopt`."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_M_MMAP_THRESHOLD, _LARGEST), mallopt(_M_TRIM_THRESHOLD, _LARGEST)])
