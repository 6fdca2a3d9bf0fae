"""Tensors that stay on disk until they are touched: memory maps, and the .safetensors format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import torch

from ..errors import CheckpointError
from .json_object import parse_json_object

if TYPE_CHECKING:
    from pathlib import Path

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_MAX_HEADER: Final = 100_000_000
"""The format's own limit on the header, in bytes."""


@dataclass(frozen=True)
class MappedFile:
    """A file whose bytes are mapped into memory, privately: writing to a tensor never reaches the file."""

    path: Path
    size: int

    @cached_property
    def storage(self) -> torch.UntypedStorage:
        """The whole file."""
        mapped: torch.UntypedStorage = torch.UntypedStorage.from_file(  # type: ignore[assignment]  # torch's stub is off
            str(self.path), shared=False, nbytes=self.size
        )
        return mapped


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file.

    Attributes
    ----------
    file
        The file.
    dtype, shape
        As stored.
    offset
        First byte, from the start of the file.
    strides
        In elements; None for a contiguous tensor.

    """

    file: MappedFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when it is contiguous."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """Return the tensor, contiguous; mapped, not copied, wherever the file's alignment allows."""
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        strides = torch.empty(self.shape, device="meta").stride() if self.strides is None else self.strides
        width = self.dtype.itemsize
        if self.offset % width == 0:
            view = torch.empty(0, dtype=self.dtype).set_(self.file.storage, self.offset // width, self.shape, strides)
            return view.contiguous()
        # Nothing aligns the tensors of a file that was repacked by other tools than torch and safetensors.
        extent = width * (1 + sum((size - 1) * stride for size, stride in zip(self.shape, strides, strict=True)))
        raw = torch.empty(0, dtype=torch.uint8).set_(self.file.storage, self.offset, (extent,), (1,))
        return raw.clone().view(self.dtype).as_strided(self.shape, strides).contiguous()


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _entry(name: str, entry: Any, file: MappedFile, start: int) -> Stored:
    """Check one tensor's description against itself."""
    where = f"{file.path} is damaged: its tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is not described by dtype, shape and data_offsets")
    shape, offsets, code = entry["shape"], entry["data_offsets"], entry["dtype"]
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CheckpointError(f"{where} has the dtype {code!r}, expected one of {', '.join(_DTYPES)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has a shape or offsets that are not whole numbers")
    stored = Stored(file, dtype, tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != stored.nbytes:
        found = offsets[1] - offsets[0]
        raise CheckpointError(f"{where} should have {stored.nbytes} bytes for its shape and dtype, found {found}")
    return stored


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Read the header of a .safetensors file.

    Returns
    -------
    dict
        Each tensor's place; nothing is read but the header.

    Raises
    ------
    CheckpointError
        If the file is cut short, or its header contradicts itself or the file's size.

    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _MAX_HEADER:
            raise CheckpointError(f"{path} is no .safetensors file: its header would have {length} bytes")
        if 8 + length > size:
            raise CheckpointError(f"{path} is cut short: its header ends at byte {8 + length}, the file has {size}")
        header = parse_json_object(stream.read(length), f"the header of {path}")
    file, start = MappedFile(path, size), 8 + length
    header.pop("__metadata__", None)
    tensors = {name: _entry(name, entry, file, start) for name, entry in header.items()}
    reached = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset < reached:
            raise CheckpointError(f"{path} is damaged: its tensor {name!r} overlaps another")
        reached = stored.offset + stored.nbytes
    if reached > size:
        raise CheckpointError(f"{path} is cut short: expected {reached} bytes, found {size}; download it again")
    return tensors
