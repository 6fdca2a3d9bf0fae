"""Publishing a bundle: it is there whole or not at all, whatever stops the build.

A build of ``NAME`` writes to ``.NAME.sdrt-building`` beside it, under a lock on ``.NAME.sdrt-lock``. When it is whole
and on the disk, the one that it replaces is renamed to ``.NAME.sdrt-old``, the new one to ``NAME``, and the old
one back to ``.NAME.sdrt-building``, where it is removed. So, whenever a process dies,

- what is called building is rubbish, unless old is there and ``NAME`` is not: then it is whole, and about to move in;
- what is called old is whole.

:func:`_settle` acts on that, for the process itself as it ends and for whoever comes next. Names that begin with a dot
are no names of bundles.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BundleBusyError, BundleError, BundleExistsError, DiskSpaceError, InputError, SdrtError
from .bundle import MANIFEST, Bundle
from .lock import GRACE_S, locked

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOTHING_FREE = 2**20
_SCRATCH = re.compile(r"\.(?P<name>.+)\.sdrt-(building|old|lock)", re.DOTALL)


@contextmanager
def publishing(
    target: Path, *, force: bool = False, expected_bytes: int | None = None, wait: bool = False
) -> Iterator[Path]:
    """Give a folder to build a bundle in, and put it in its place when the block ends well.

    Parameters
    ----------
    target
        Where the bundle shall be; its parent must exist.
    force
        Replace a bundle that is there. It stays until the new one is whole.
    expected_bytes
        What will be written, to refuse before starting if the disk has no room for it.
    wait
        If another process is building this very bundle, wait for its end rather than refuse.

    Yields
    ------
    Path
        An empty folder on the file system of ``target``. The block writes the files there, and ``bundle.json`` last
        (:func:`~.bundle.write_manifest`). It is removed if the block raises.

    Raises
    ------
    BundleExistsError
        There is a bundle at ``target``, and ``force`` was not given.
    BundleBusyError
        Another process is building it.
    BundleCorruptError
        The block ended well and left no whole bundle.
    BundleError
        The bundle could not be moved to its place.
    DiskSpaceError
        ``expected_bytes`` are not free, or the disk ran full.
    InputError
        ``target`` is a file, a link, or a folder of other things, or its parent is missing or cannot be written.

    """
    target = _checked(Path(target))
    with _lock(target, patience_s=math.inf if wait else GRACE_S):
        _clean_store(target)
        _settle(target)
        refuse_existing(target, force=force)
        _check_space(target, expected_bytes)
        building = _building(target)
        try:
            _make(building)
            yield building
            Bundle.open(building)
            _put_in_place(building, target)
        except Exception as error:
            if _ran_full(error, target.parent):
                raise DiskSpaceError(_full(building, expected_bytes)) from error
            raise
        finally:
            _settle(target)


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Give an empty folder for what the build of a bundle needs and nobody keeps.

    It is removed at the end; what a killed build leaves there, the next build in the same folder removes.

    Parameters
    ----------
    target
        Names the folder, which is no bundle and is not listed as one; its parent must exist.

    Raises
    ------
    BundleBusyError, InputError
        As :func:`publishing`.

    """
    target = _checked(Path(target))
    with _lock(target):
        _settle(target)
        folder = _building(target)
        try:
            _make(folder)
            yield folder
        finally:
            _settle(target)


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise what :func:`publishing` raises where something is at a bundle's place, before minutes of work.

    Raises
    ------
    BundleExistsError
        A bundle is there, and ``force`` was not given.
    InputError
        Something else is there, which ``force`` does not replace either, or no bundle can be there.

    """
    target = _checked(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file, expected a folder or nothing: choose another name")
    if not any(target.iterdir()):
        return
    if not (target / MANIFEST).is_file():
        # --force replaces bundles; it must not cost a user the folder of pictures named by mistake
        raise InputError(f"{target} holds other files and no bundle: choose another name, or empty it first")
    if not force:
        raise BundleExistsError(f"{target} exists already: give --force to replace it, or choose another name")


def recover(target: Path) -> None:
    """Bring back a bundle whose replacement was cut short by a crash, or wait for one that is going on.

    There is nothing to do but in the very moment between two renames, and nothing is done where it cannot be.
    """
    with suppress(BundleBusyError, InputError, OSError, ValueError):
        if _old(target).exists() and not target.exists():
            with _lock(target):
                _settle(target)


def recover_all(folder: Path) -> None:
    """Call :func:`recover` for all bundles of a folder."""
    for name in _scratch_names(folder):
        recover(folder / name)


def _building(target: Path) -> Path:
    return target.with_name(f".{target.name}.sdrt-building")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.sdrt-old")


@contextmanager
def _lock(target: Path, *, patience_s: float = GRACE_S) -> Iterator[None]:
    entered = False
    try:
        with locked(target.with_name(f".{target.name}.sdrt-lock"), str(target), patience_s=patience_s):
            entered = True
            yield
    except OSError as error:
        if entered:
            raise
        raise _unwritable(target.parent, error) from None


def _unwritable(parent: Path, error: OSError) -> Exception:
    if _is_disk_full(error):
        return DiskSpaceError(f"the disk of {parent} is full: free some space or choose another folder")
    return InputError(
        f"{parent} cannot be written ({error.strerror}): choose another folder, or change its permissions"
    )


def _checked(target: Path) -> Path:
    try:
        # the name of "." or of "x/.." is known only after resolving
        full = target.parent.resolve() / target.name if target.name not in ("", "..") else target.resolve()
        parent_is_folder, is_link = full.parent.is_dir(), full.is_symlink()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL
        raise InputError(f"{os.fspath(target)!r} cannot be a bundle's folder: {error}") from None
    if not full.name or "\0" in full.name or _SCRATCH.fullmatch(full.name):
        raise InputError(f"{str(full)!r} cannot be a bundle's folder: choose another name")
    if not parent_is_folder:
        found = "is not a folder" if full.parent.exists() else "does not exist"
        raise InputError(f"{full.parent} {found}, expected a folder to put {full.name} in: make it first")
    if is_link:
        raise InputError(f"{full} is a link, expected a folder or nothing: give the folder that it leads to")
    return full


def _check_space(target: Path, expected: int | None) -> None:
    free = shutil.disk_usage(target.parent).free
    if expected is not None and free < expected:
        raise DiskSpaceError(
            f"{target} needs {expected} bytes and the disk has {free} bytes free: "
            f"free {expected - free} more, or choose a folder on another disk"
        )


def _make(building: Path) -> None:
    try:
        building.mkdir()
    except FileExistsError:
        raise InputError(f"{building} is left of a build that was killed and cannot be removed: remove it") from None
    except OSError as error:
        raise _unwritable(building.parent, error) from None


def _put_in_place(building: Path, target: Path) -> None:
    try:
        _sync_tree(building)
        if target.exists():
            if any(target.iterdir()):
                target.rename(_old(target))
            else:
                target.rmdir()
        building.rename(target)
    except OSError as error:
        raise BundleError(
            f"{target} could not be put in its place ({error.strerror}): see that nothing uses it, and build again"
        ) from error
    _sync_folder(target.parent)


def _settle(target: Path) -> None:
    """Under the lock: leave the target whole, if there is or was one, and nothing else."""
    building, old = _building(target), _old(target)
    if old.exists() and not target.exists():
        try:
            building.rename(target)
        except OSError:
            old.rename(target)
    # removal takes time and can be cut short: what is cut is no longer called old
    if old.exists():
        shutil.rmtree(building, ignore_errors=True)
        old.rename(building)
    shutil.rmtree(building, ignore_errors=True)


def _clean_store(target: Path) -> None:
    """Settle what killed builds of other bundles left beside this one; the lock of a living one is taken."""
    with suppress(OSError):  # a folder may be writable and not readable
        for name in _scratch_names(target.parent) - {target.name}:
            other = target.with_name(name)
            with suppress(BundleBusyError, InputError, OSError), _lock(other, patience_s=0):
                _settle(other)


def _scratch_names(folder: Path) -> set[str]:
    return {match["name"] for name in os.listdir(folder) if (match := _SCRATCH.fullmatch(name))}  # noqa: PTH208 - names


def _ran_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, DiskSpaceError):
        return False
    # libraries that write through C report a failed write without its cause
    free = _NOTHING_FREE
    with suppress(OSError):  # the folder itself may be what is gone
        free = shutil.disk_usage(folder).free
    silent = not isinstance(error, SdrtError) and free < _NOTHING_FREE
    return silent or _is_disk_full(error)


def _is_disk_full(error: BaseException | None) -> bool:
    """Look through the causes as well: libraries wrap the error of the write in their own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _full(building: Path, expected: int | None) -> str:
    written = sum(path.stat().st_size for path in building.rglob("*") if path.is_file())
    needed = f"{expected} are needed" if expected is not None else "more are needed"
    free = shutil.disk_usage(building.parent).free
    return (
        f"the disk of {building.parent} ran full after {written} bytes of which {needed} ({free} are free): "
        "free some space, or choose a folder on another disk"
    )


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            # read-write: Windows flushes no file that is open for reading
            with (Path(root) / name).open("r+b") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
