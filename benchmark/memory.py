"""Memory of a training process on a CPU."""

from __future__ import annotations

import contextlib
import ctypes

# malloc.h of the GNU C library
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Tells the C library to keep what is freed for the next step, which asks for the same sizes again.

    By default large tensors go back to the operating system at once, and every step gets them anew, page by page and filled with zeros:
    some 5 % of a step. Where the C library is another one, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)
