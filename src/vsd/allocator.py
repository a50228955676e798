"""Linux CPUs: glibc keeps freed buffers instead of returning them to the kernel after every operation.

By default the kernel maps and zeroes new pages for every tensor above 32 MB. With freed buffers kept, element-wise
operations on such tensors are two to three times faster. The environment variables `MALLOC_MMAP_THRESHOLD_` and
`MALLOC_TRIM_THRESHOLD_` have the same effect.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Set both thresholds to their maximum; False if the C library has no `mallopt`."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_M_MMAP_THRESHOLD, _LARGEST), mallopt(_M_TRIM_THRESHOLD, _LARGEST)])
