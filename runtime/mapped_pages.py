"""Pages of files that a library has mapped into this process and has done with."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAPS = Path("/proc/self/maps")
_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) r--[sp] [0-9a-f]+ [0-9a-f:]+ [0-9]+ +(.*)\n")
_MADV_DONTNEED = 4  # in Linux on every architecture but alpha


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


def _mappings(path: bytes) -> Iterator[tuple[int, int]]:
    """Give the addresses at which a file is mapped for reading."""
    shown = path.replace(b"\n", b"\\012")  # as the kernel writes it
    with _MAPS.open("rb") as maps:
        for line in maps:
            found = _LINE.fullmatch(line)
            if found and found[3] == shown:
                yield int(found[1], 16), int(found[2], 16)
