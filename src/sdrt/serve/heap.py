"""The C library's heap, in a process that lives long."""

from __future__ import annotations

import ctypes
import sys

_M_ARENA_MAX = -8  # in glibc's malloc.h


def use_one_heap() -> None:
    """Have all threads allocate from one heap, where the C library is glibc; for the start, before there are threads.

    By default threads have several, and what is free in one is of no use to the others: at its limit a server grew from
    511 to 615 MB in seven minutes, and one with one heap stayed between 394 and 472 (``bench/README.md``).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
