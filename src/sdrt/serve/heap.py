"""The C library's heap, in a process that lives long."""

from __future__ import annotations

import ctypes
import sys

_M_ARENA_MAX = -8  # in glibc's malloc.h


def use_one_heap() -> None:
    """Have all threads allocate from one heap, where the C library is glibc; for the start, before there are threads.

    By default threads have several. Pictures and answers are made in one thread and freed in another, and a server at
    its limit grew by 30 MB a minute: what was free in one heap was wanted in another.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
