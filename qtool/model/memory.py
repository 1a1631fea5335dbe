"""Host memory goes back to the system as soon as it is free, so that blocks of a model do not pile up.

glibc keeps what was freed for later: holes of one block's shapes stay beside the next block's, and every large piece that
is freed raises the size (up to 32 MiB) from which pieces are the system's own and vanish when freed.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE = 2 << 20  # below it the system's own pieces cost more time than their holes cost memory
GLIBC_LARGEST = 32 << 20


def return_free_memory() -> None:
    """Hand what was freed back to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@contextlib.contextmanager
def large_pieces_returned() -> Iterator[None]:
    """Inside, every piece of 2 MiB and more, or what MALLOC_MMAP_THRESHOLD_ says, goes back the moment it is freed."""
    libc = None if "MALLOC_MMAP_THRESHOLD_" in os.environ else _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        if libc is not None:
            libc.mallopt(M_MMAP_THRESHOLD, GLIBC_LARGEST)


def _glibc() -> ctypes.CDLL | None:
    """None under another C library, which needs no telling."""
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") else None
