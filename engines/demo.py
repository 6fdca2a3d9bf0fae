"""The demo model as it ships: its ONNX bundle, and the checkpoint that the bundle was built of, in one archive.

Both hold the same numbers: the checkpoint's are float16, and the bundle's are these as float32, matrices transposed.
So the archive keeps the bundle's weights as the checkpoint has them, and is little larger than a packed checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import tarfile
import tempfile
from pathlib import Path

from ..errors import BackendError, BundleCorruptError, DiskSpaceError, InputError

NAME = "demo"
"""What ``--bundle``, ``--ckpt`` and `sdrt.load` call it."""

ARCHIVE = Path(__file__).with_name("demo.tar.xz")
BUNDLE, CHECKPOINT = NAME, "checkpoint"
HALVED = ".half"
"""Ends the name of a file of little-endian float32 numbers that the archive keeps as float16."""
TURNED = ".turned.json"
"""Ends the name of the list of a file's matrices that the archive keeps transposed: first number, rows, columns."""


def bundle_folder(home: Path) -> Path:
    """Give the folder of the demo's bundle, unpacking it at first use (25 MB, about a second).

    Parameters
    ----------
    home
        The folder where sdrt keeps what it makes.

    Raises
    ------
    BundleCorruptError
        The archive that came with sdrt is missing or damaged.
    DiskSpaceError, InputError
        There is no room in ``home``, or it cannot be written.
    BackendError
        This Python lacks ``lzma``.

    """
    return _unpacked(home, BUNDLE)


def checkpoint_folder(home: Path) -> Path:
    """Give the diffusers folder of the demo's checkpoint, unpacking it at first use; errors as `bundle_folder`."""
    return _unpacked(home, CHECKPOINT)


def _unpacked(home: Path, part: str) -> Path:
    try:
        digest = hashlib.sha256(ARCHIVE.read_bytes()).hexdigest()
    except OSError as error:
        raise _damaged(error) from None
    folder = home / "shipped" / digest[:16] / part
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _unpack(part, folder)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskSpaceError(f"the disk of {home} is full, and the demo needs 40 MB: free some") from None
        raise InputError(
            f"{folder} cannot be made ({error.strerror}): set SDRT_HOME to a folder that can be written"
        ) from None
    return folder


def _unpack(part: str, folder: Path) -> None:
    """Unpack beside the place, then rename; whoever is second finds it taken by the same files, and drops its own."""
    try:
        import lzma  # noqa: PLC0415 - a Python may have been built without it, and does for all but this
    except ImportError:
        raise BackendError(
            "this Python was built without lzma, with which the demo is packed: take another Python, or build a "
            "bundle with sdrt build --ckpt v1-1"
        ) from None
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as beside:
        try:
            with tarfile.open(ARCHIVE, "r:xz") as archive:
                members = [member for member in archive if member.name.startswith(f"{part}/")]
                archive.extractall(beside, members, filter="data")
        except (tarfile.TarError, EOFError, lzma.LZMAError) as error:
            raise _damaged(error) from None
        scratch = Path(beside) / part
        for halved in scratch.glob(f"*{HALVED}"):
            _widen(halved)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _widen(halved: Path) -> None:
    """Make a file of weights what it was: see `HALVED` and `TURNED`."""
    import numpy as np  # noqa: PLC0415 - most starts find the demo unpacked

    whole = halved.with_suffix("")
    turned = whole.with_name(whole.name + TURNED)
    numbers = np.fromfile(halved, "<f2").astype("<f4")
    for first, rows, columns in json.loads(turned.read_text(encoding="ascii")):
        matrix = numbers[first : first + rows * columns]
        matrix[:] = matrix.reshape(columns, rows).T.ravel()
    numbers.tofile(whole)
    halved.unlink()
    turned.unlink()


def _damaged(error: Exception) -> BundleCorruptError:
    return BundleCorruptError(f"{ARCHIVE}, which came with sdrt, is missing or damaged ({error}): install sdrt again")
