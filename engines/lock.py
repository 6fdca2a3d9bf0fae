"""A lock that the operating system gives back when its holder dies, however it dies."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..errors import BundleBusyError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: One that is cleaning up after a dead process holds the lock for a moment; that is no reason to refuse.
GRACE_S = 0.5
_POLL_S = 0.05

if sys.platform == "win32":
    import msvcrt

    # A locked region cannot be read by others: lock one byte far behind the text that tells who holds it.
    _REGION = 2**30

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, _REGION, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def locked(path: Path, what: str, *, patience_s: float = GRACE_S) -> Iterator[None]:
    """Hold an exclusive lock; the file is removed at the end, so that nothing is left beside the bundle.

    Parameters
    ----------
    path
        The lock's file; it is made if it is not there.
    what
        What is locked, for the message.
    patience_s
        Seconds to wait for the holder before refusing; ``math.inf`` waits for as long as it takes.

    Raises
    ------
    BundleBusyError
        Another process, or another thread of this one, holds the lock.
    OSError
        The file cannot be made, or the file system has no locks.

    """
    refuse_at = time.monotonic() + patience_s
    while (descriptor := _try_open_locked(path)) is None:
        if time.monotonic() >= refuse_at:
            raise BundleBusyError(f"{what} is being built {_holder(path)}: wait for it to end, or stop it")
        time.sleep(_POLL_S)
    try:
        with suppress(OSError):  # who holds the lock is a courtesy: a full disk is no reason to fail here
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n".encode())
        yield
    finally:
        # While the lock is still held: another that opened the file meanwhile sees that it is gone and starts over.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _try_open_locked(path: Path) -> int | None:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags, 0o666)
    taken = False
    try:
        taken = _try_lock(descriptor) and _is_still_there(descriptor, path)
    finally:
        if not taken:
            os.close(descriptor)
    return descriptor if taken else None


def _is_still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        pid, since = path.read_text(encoding="ascii").split("\n")[:2]
    except (OSError, ValueError):
        return "by another process"
    return f"by process {pid} since {since}"
