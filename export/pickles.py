"""Original .ckpt files, read without unpickling them.

A .ckpt is a zip archive of raw tensors and one pickle that says what they are. The pickle is walked by
`pickle_machine`, which runs nothing; what it describes is checked against the bytes before a tensor is mapped.
"""

from __future__ import annotations

import itertools
import math
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import CheckpointError, UnsafeCheckpointError
from .pickle_machine import Description, pickle_lengths, walk
from .tensor_file import MappedFile, Stored

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_MAX_PICKLE: Final = 32 << 20
"""Bytes of pickle that are walked at most; a Stable Diffusion checkpoint with its optimizer's state has 3 million."""


@dataclass(frozen=True)
class Pickled:
    """What a .ckpt holds.

    Attributes
    ----------
    tensors
        The weights, by name: those of ``state_dict`` where there is one.
    names
        The names at the top of the file, ``state_dict`` aside, for telling what it is.

    """

    tensors: Mapping[str, Stored]
    names: frozenset[str]


@dataclass(frozen=True)
class _Archive:
    path: Path
    size: int
    pickled: bytes
    members: Mapping[str, tuple[int, int]]
    """Offset and bytes of each storage, by its key."""


def _member_ranges(path: Path, size: int, infos: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """Find where each member's bytes lie, having checked that they lie in the file, uncompressed and apart."""
    if sum(info.file_size for info in infos) > size:
        raise UnsafeCheckpointError(f"{path} promises more bytes than the file has ({size}): it is refused")
    ranges: dict[str, tuple[int, int]] = {}
    reached = 0
    with path.open("rb") as stream:
        for info in sorted(infos, key=lambda info: info.header_offset):
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise UnsafeCheckpointError(
                    f"{path} has a compressed or encrypted member ({info.filename!r}), which PyTorch does not write"
                )
            if not reached <= info.header_offset <= size - 30:
                raise CheckpointError(f"{path} is damaged: its member {info.filename!r} is not where it should be")
            stream.seek(info.header_offset)
            local = stream.read(30)
            start = info.header_offset + 30 + int.from_bytes(local[26:28], "little")
            start += int.from_bytes(local[28:30], "little")
            end = start + info.file_size
            if local[:4] != b"PK\x03\x04" or end > size or info.filename in ranges:
                raise CheckpointError(f"{path} is damaged: its member {info.filename!r} is not where it should be")
            reached = end
            ranges[info.filename] = (start, info.file_size)
    return ranges


def _open_archive(path: Path) -> _Archive:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError) as error:
        raise CheckpointError(
            f"{path} is cut short or damaged: a zip archive ends with a directory, and none was found in its {size} "
            f"bytes ({str(error)[:80]}); download it again"
        ) from None
    ranges = _member_ranges(path, size, infos)
    pickles = [name for name in ranges if name == "data.pkl" or name.endswith("/data.pkl")]
    if any(name.endswith("/constants.pkl") for name in ranges):
        raise CheckpointError(f"{path} is a TorchScript program, not a checkpoint")
    if len(pickles) != 1:
        raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote: it has no single data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    start, count = ranges[pickles[0]]
    if count > _MAX_PICKLE:
        raise UnsafeCheckpointError(f"{path} has a pickle of {count} bytes, expected at most {_MAX_PICKLE}")
    with path.open("rb") as stream:
        stream.seek(start)
        pickled = stream.read(count)
        if prefix + "byteorder" in ranges:
            stream.seek(ranges[prefix + "byteorder"][0])
            if stream.read(6) != b"little":
                raise CheckpointError(f"{path} was written on a big-endian machine; save it again on another")
    data = prefix + "data/"
    members = {name.removeprefix(data): place for name, place in ranges.items() if name.startswith(data)}
    return _Archive(path, size, pickled, members)


def _locate(name: str, tensor: Description, archive: _Archive, file: MappedFile) -> Stored:
    """Check a described tensor against the bytes that are there."""
    storage, width = tensor.storage, tensor.storage.dtype.itemsize
    where = f"{archive.path}: tensor {name!r:.100}"
    if storage.key not in archive.members:
        raise CheckpointError(f"{where} lies in a storage {storage.key!r:.40}, which the file does not have")
    start, present = archive.members[storage.key]
    if storage.count * width != present:
        raise UnsafeCheckpointError(
            f"{where} lies in a storage that should have {storage.count * width} bytes, found {present}"
        )
    if len(tensor.shape) != len(tensor.strides):
        raise CheckpointError(f"{where} has {len(tensor.shape)} dimensions but {len(tensor.strides)} strides")
    count = math.prod(tensor.shape)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((size - 1) * stride for size, stride in steps) if count else 0
    if count > storage.count or (count and last >= storage.count):
        shape = "x".join(map(str, tensor.shape))
        raise UnsafeCheckpointError(
            f"{where} should have {shape} = {count} elements, but its storage has {storage.count}: it is refused"
        )
    return Stored(file, storage.dtype, tensor.shape, start + tensor.offset * width, tensor.strides)


def read_pickle(path: Path) -> Pickled:
    """Read what a .ckpt, .pt or .bin file describes; no code in it is run and no tensor is read.

    Raises
    ------
    UnsafeCheckpointError
        If it names anything that weights do not need, is compressed, or promises more than it holds.
    CheckpointError
        If it is damaged.

    """
    archive = _open_archive(path)
    top = walk(archive.pickled, str(path))
    if isinstance(top, Description):
        top = {"tensor": top}
    if not isinstance(top, dict):
        raise CheckpointError(f"{path} holds no named tensors: at its top is a {type(top).__name__.strip('_').lower()}")
    names = frozenset(name for name in top if isinstance(name, str) and name != "state_dict")
    state = top.get("state_dict", top)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no named tensors: its state_dict is a {type(state).__name__}")
    file = MappedFile(path, archive.size)
    tensors = {
        name: _locate(name, tensor, archive, file)
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, Description)
    }
    promised = sum(stored.nbytes for stored in tensors.values())
    if promised > archive.size:
        raise UnsafeCheckpointError(f"{path} promises {promised} bytes of weights in {archive.size}: it is refused")
    return Pickled(tensors, names)


def refuse_raw_pickle(path: Path) -> None:
    """Refuse a pickle outside a zip archive: PyTorch's format before 1.6, or something hostile.

    Raises
    ------
    UnsafeCheckpointError
        If one of its first pickles names something that weights do not need.
    CheckpointError
        Otherwise.

    """
    with path.open("rb") as stream:
        head = stream.read(_MAX_PICKLE)
    position = 0
    # A magic number, a version, the machine's sizes, then the weights' description.
    for end in itertools.islice(pickle_lengths(head), 4):
        try:
            walk(head[position:end], str(path))
        except UnsafeCheckpointError:
            raise
        except CheckpointError:
            break
        position = end
    raise CheckpointError(
        f"{path} is a pickle in the format of PyTorch before 1.6, which is not read; if you trust it, convert it with "
        "python -c \"import torch; torch.save(torch.load('OLD', weights_only=True, map_location='cpu'), 'NEW')\""
    )
