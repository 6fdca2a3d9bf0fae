"""A graph's weights in the order in which the kernels read them, made once and mapped from a file by every process."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np

from .mapped_pages import hold_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from .compile_cache import CompileCache

_LAYOUT = 1
"""Of the tiles of ``product.c``; files of another one are not found."""
_PAGE = 4096
_LENGTH = np.dtype("<u8")
_NUMBERED = re.compile(r"Constant_\d+")
"""What OpenVINO calls a constant that has no name of its own: next time it is another's."""


class PackedWeights:
    """The packed weights of one graph, whatever the shapes of its inputs.

    Parameters
    ----------
    cache
        Where they are kept for other processes; None for nowhere.
    component
        Whose graph it is.

    """

    def __init__(self, cache: CompileCache | None = None, component: str = "") -> None:
        self._cache, self._name = cache, f"{component}-packed{_LAYOUT}"
        self._packed: dict[str, NDArray[np.uint8]] = {}
        self._is_kept = cache is None
        self._has_looked = False

    def get(self, names: Sequence[str], nbytes: int, pack: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Give the packed weights of constants by their names, as `pack` makes them."""
        if any(map(_NUMBERED.fullmatch, names)):
            return pack()
        if not self._has_looked:
            self._has_looked = True
            self._look()
        key = "\n".join(names)
        if key not in self._packed or self._packed[key].nbytes != nbytes:
            self._packed[key] = pack()
        return self._packed[key]

    def keep(self) -> None:
        """Keep them for other processes, unless that was done."""
        if self._is_kept or self._cache is None or not self._packed:
            return
        self._is_kept = True
        places, at = {}, 0
        for key, numbers in self._packed.items():
            places[key] = [at, numbers.nbytes]
            at += -(-numbers.nbytes // _PAGE) * _PAGE
        header = json.dumps(places).encode()
        begins = -(-(_LENGTH.itemsize + len(header)) // _PAGE) * _PAGE
        parts: list[bytes | memoryview] = [np.array(len(header), _LENGTH).tobytes(), header]
        parts.append(bytes(begins - _LENGTH.itemsize - len(header)))
        for numbers in self._packed.values():
            parts += [numbers.data, bytes(-numbers.nbytes % _PAGE)]
        self._cache.keep_file(self._name, parts)

    def _look(self) -> None:
        file = None if self._cache is None else self._cache.file(self._name)
        if file is None:
            return
        self._packed = _read(file)
        self._is_kept = True

    def clear(self) -> None:
        """Let go of them; graphs keep their own."""
        self._packed.clear()
        self._has_looked = False


def _read(file: Path) -> dict[str, NDArray[np.uint8]]:
    mapped = np.memmap(file, np.uint8, "c")  # nobody writes, but OpenVINO asks for arrays that could be written to
    hold_pages(mapped)
    length = int(mapped[: _LENGTH.itemsize].view(_LENGTH)[0])
    places = json.loads(mapped[_LENGTH.itemsize :][:length].tobytes())
    begins = -(-(_LENGTH.itemsize + length) // _PAGE) * _PAGE
    return {key: mapped[begins + at : begins + at + nbytes] for key, (at, nbytes) in places.items()}
