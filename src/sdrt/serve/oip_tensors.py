"""Tensors as the Open Inference Protocol carries them: what a client sent becomes numbers and strings.

Elements are little-endian and lie one after the other; a BYTES element is its length, in four bytes, and itself. JSON
has them as a list, nested or not.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .http import MOST_BYTES, RefusalError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

ANY = -1
"""A dimension of any size."""

_NUMBERS: dict[str, np.dtype[Any]] = {
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT64": np.dtype("<u8"),
    "FP32": np.dtype("<f4"),
}
_LENGTH = struct.Struct("<I")
_SHOWN = 100


class SharedPart(Protocol):
    """A part of shared memory."""

    @property
    def byte_size(self) -> int:
        """How large it is."""

    def read(self) -> bytes:
        """Give a copy of it."""

    def write(self, content: bytes | memoryview) -> None:
        """Put bytes at its beginning."""


@dataclass(frozen=True)
class TensorMetadata:
    """A tensor that a model takes or gives.

    Attributes
    ----------
    name
        Its name.
    datatype
        ``BYTES``, ``UINT8``, ``INT32``, ``INT64`` or ``FP32``.
    shape
        Its dimensions; `ANY` for one of any size.
    optional
        Whether it may be left out.

    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class InputTensor:
    """A tensor as a client sent it, not looked at yet.

    Attributes
    ----------
    name, datatype, shape
        As it says.
    content
        A list, from JSON or a message; bytes; or where in shared memory they are.

    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: list[Any] | bytes | SharedPart

    def values(self, expected: TensorMetadata, also: str | None = None) -> list[Any]:
        """Give its elements: int, float or str.

        A float is the shortest decimal number that FP32 rounds to the one sent, so that 7.1 is 7.1.

        Parameters
        ----------
        expected
            What the model takes; of one dimension.
        also
            Another datatype that it takes.

        Raises
        ------
        RefusalError
            The tensor is another, or does not hold what it says.

        """
        if self.datatype not in {expected.datatype, also}:
            raise self._wrong(f"is of datatype {_show(self.datatype)}", expected.datatype)
        (size,) = expected.shape
        if len(self.shape) != 1 or self.shape[0] < 0 or size not in {ANY, self.shape[0]}:
            raise self._wrong(f"has the shape {_show(list(self.shape))}", f"[{'any' if size == ANY else size}]")
        (count,) = self.shape
        if count > MOST_BYTES:
            raise self._wrong(f"has the shape [{count}]", "fewer elements")
        if self.datatype == "BYTES":
            return self._strings(count)
        numbers = self._numbers(count)
        return [float(str(number)) for number in numbers] if self.datatype == "FP32" else numbers.tolist()

    def _numbers(self, count: int) -> NDArray[Any]:
        dtype = _NUMBERS[self.datatype]
        if isinstance(self.content, list):
            return self._from_list(self.content, count, dtype)
        size = count * dtype.itemsize
        content = self._bytes(self.content, size)
        if len(content) != size:
            raise self._wrong(f"has {len(content)} bytes of data", f"{size} for its shape [{count}]")
        return np.frombuffer(content, dtype)

    def _from_list(self, content: list[Any], count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        if dtype.kind == "f":
            flat = self._flat(content, count, (int, float), "numbers")
            most = float(np.finfo(dtype).max)
            least = -most
        else:
            flat = self._flat(content, count, (int,), "whole numbers")
            least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        for value in flat:
            if not least <= value <= most:
                raise self._wrong(f"holds {_show(value)}", f"numbers of {self.datatype}")
        return np.array(flat, dtype)

    def _strings(self, count: int) -> list[str]:
        if isinstance(self.content, list):
            parts = self._flat(self.content, count, (str, bytes), "strings")
        else:
            parts = list(self._split(self._bytes(self.content, MOST_BYTES)))
            if len(parts) != count:
                raise self._wrong(f"has {len(parts)} strings", f"{count} for its shape [{count}]")
        try:
            return [part if isinstance(part, str) else part.decode("utf-8") for part in parts]
        except UnicodeDecodeError:
            raise self._wrong("holds a string that is not UTF-8", "UTF-8") from None

    def _split(self, content: bytes) -> Iterator[bytes]:
        position = 0
        while position < len(content):
            begin = position + _LENGTH.size
            length = _LENGTH.unpack_from(content, position)[0] if begin <= len(content) else 0
            position = begin + length
            if position > len(content):
                raise self._wrong("ends within a string", "for each string its length in four bytes and itself")
            yield content[begin:position]

    def _bytes(self, content: bytes | SharedPart, most: int) -> bytes:
        """Give the bytes, of which shared memory may have more than anybody should read."""
        if isinstance(content, bytes):
            return content
        if content.byte_size > most:
            raise self._wrong(f"has {content.byte_size} bytes of shared memory", f"at most {most}")
        return content.read()

    def _flat(self, content: list[Any], count: int, kinds: tuple[type, ...], what: str) -> list[Any]:
        flat: list[Any] = []
        waiting = [iter(content)]
        while waiting:
            for value in waiting[-1]:
                if isinstance(value, list):
                    waiting.append(iter(value))
                    break
                if not isinstance(value, kinds) or isinstance(value, bool):
                    raise self._wrong(f"holds {_show(value)}", what)
                flat.append(value)
            else:
                waiting.pop()
        if len(flat) != count:
            raise self._wrong(f"has {len(flat)} elements", f"{count} for its shape [{count}]")
        return flat

    def _wrong(self, found: str, expected: str) -> RefusalError:
        return RefusalError(400, f"input {_show(self.name)} {found}: expected {expected}", param=self.name)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
