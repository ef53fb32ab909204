"""Memory that was freed goes back to the system at once, for a peer that has planned with all it may take.

glibc takes blocks of over 128 kB from the system one by one, but once such a block is freed it keeps the next ones of
that size (up to 32 MB) for later, in between what lives on. Of a training peer that is a tenth of its memory, in no
plan. A fixed limit ends it; the price is that the kernel hands out the pages of each new large tensor anew.
"""

from __future__ import annotations

import ctypes
import sys

LARGE_BYTES = 1024 * 1024
_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of malloc.h"""


def return_freed_memory() -> bool:
    """From now on blocks over 1 MiB go back when they are freed. False: this is no glibc, and nothing was changed."""
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL(None)
        done = libc.mallopt(_MMAP_THRESHOLD, LARGE_BYTES) == 1
        libc.malloc_trim(0)  # and what is free already
        return bool(done)
    except (OSError, AttributeError):
        return False
