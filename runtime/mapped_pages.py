"""Pages of mapped files: those that a library has done with, and those that are needed again and again."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_MAPS = Path("/proc/self/maps")
_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) r--[sp] [0-9a-f]+ [0-9a-f:]+ [0-9]+ +(.*)\n")
_MADV_DONTNEED = 4  # in Linux on every architecture but alpha
_MLOCK_ONFAULT = 1


def let_go_of_pages(file: Path) -> None:
    """Take the pages of a mapped file out of this process's memory; does nothing where this is not Linux.

    They stay in the system's cache, from where they come back when they are read. Mappings that can be written to are
    left alone.
    """
    if not _MAPS.exists():
        return
    libc = ctypes.CDLL(None)
    for begin, end in _mappings(os.fsencode(os.path.realpath(file))):
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def hold_pages(array: NDArray[Any]) -> None:
    """Keep the pages of a mapped file in memory once they have been read, as far as the system allows this process to.

    Else it may drop those of a program that waits for its next request, and read them anew at the cost of seconds.
    """
    if _MAPS.exists() and (lock := getattr(ctypes.CDLL(None), "mlock2", None)) is not None:
        lock(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), _MLOCK_ONFAULT)


def _mappings(path: bytes) -> Iterator[tuple[int, int]]:
    """Give the addresses at which a file is mapped for reading."""
    shown = path.replace(b"\n", b"\\012")  # as the kernel writes it
    with _MAPS.open("rb") as maps:
        for line in maps:
            found = _LINE.fullmatch(line)
            if found and found[3] == shown:
                yield int(found[1], 16), int(found[2], 16)
