"""Memory that clients share with the server: POSIX shared memory regions, registered by name.

A region is read and written through its descriptor and never mapped: whoever made it can cut it short at any time, and
a mapping that has lost its file ends the process with SIGBUS.
"""

from __future__ import annotations

import os
import stat
import threading
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_REGIONS = 256
"""Each holds a descriptor, of which a process has a thousand or so."""
_FOLDER = "/dev/shm"  # noqa: S108 - where Linux has POSIX shared memory; what is opened in it is no temporary file
_SHOWN = 100


class RegionError(InputError):
    """A region that cannot be registered or used as asked."""


class RegionMissingError(RegionError):
    """No region is registered under that name."""


class RegionExistsError(RegionError):
    """A region is registered under that name already."""


class SharedMemoryOffError(RegionError):
    """The server was not told to share memory."""


class Region(ABC):
    """Memory that clients refer to by a name.

    Attributes
    ----------
    name
        Under which it is registered.
    byte_size
        How large it is.

    """

    name: str
    byte_size: int

    @abstractmethod
    def read(self, offset: int, byte_size: int) -> bytes:
        """Give a copy of a part of it, which lies within it."""

    @abstractmethod
    def write(self, offset: int, content: bytes | memoryview) -> None:
        """Put bytes into it; they fit."""


@dataclass(frozen=True, eq=False)
class SystemRegion(Region):
    """A part of a POSIX shared memory object; its descriptor is closed with it.

    Attributes
    ----------
    name
        Under which it is registered.
    key
        The object's name, as it was given.
    offset, byte_size
        Where in the object the region begins, and how large it is.
    descriptor
        Of the object.

    """

    name: str
    key: str
    offset: int
    byte_size: int
    descriptor: int

    def __post_init__(self) -> None:
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, offset: int, byte_size: int) -> bytes:
        """Give a copy of a part of it, which lies within it.

        Raises
        ------
        RegionError
            The object was cut short.

        """
        begin = self._begin(offset, byte_size)
        parts = bytearray()
        while missing := byte_size - len(parts):
            part = os.pread(self.descriptor, missing, begin + len(parts))
            if not part:
                raise self._cut_short(begin + byte_size)
            parts += part
        return bytes(parts)

    def write(self, offset: int, content: bytes | memoryview) -> None:
        """Put bytes into it; they fit.

        Raises
        ------
        RegionError
            The object was cut short, or there is no memory left for it.

        """
        rest = memoryview(content).cast("B")
        begin = self._begin(offset, len(rest))
        try:
            while rest:
                written = os.pwrite(self.descriptor, rest, begin)
                begin += written
                rest = rest[written:]
        except OSError as error:
            raise RegionError(
                f"shared memory region {_show(self.name)} cannot be written ({error.strerror}): make another"
            ) from None

    def _begin(self, offset: int, byte_size: int) -> int:
        """Give the place in the object, having made sure that all of it is still there."""
        begin = self.offset + offset
        if os.fstat(self.descriptor).st_size < begin + byte_size:
            raise self._cut_short(begin + byte_size)
        return begin

    def _cut_short(self, end: int) -> RegionError:
        return RegionError(
            f"shared memory region {_show(self.name)} was cut short: expected {_show(self.key)} to have at least "
            f"{end} bytes"
        )


@dataclass(frozen=True, eq=False)
class View:
    """A part of a region, which stays usable when the region is unregistered.

    Attributes
    ----------
    region
        The region.
    offset, byte_size
        Of this part, in the region.

    """

    region: Region
    offset: int
    byte_size: int

    def read(self) -> bytes:
        """Give a copy of what is there now.

        Raises
        ------
        RegionError
            It is not there any more.

        """
        return self.region.read(self.offset, self.byte_size)

    def write(self, content: bytes | memoryview) -> None:
        """Put bytes there, from this part's beginning on.

        Parameters
        ----------
        content
            At most `byte_size` contiguous bytes.

        Raises
        ------
        RegionError
            There are more of them, the memory is not there any more, or there is none left.

        """
        size = memoryview(content).nbytes
        if size > self.byte_size:
            raise RegionError(
                f"{size} bytes do not fit into {self.byte_size} of shared memory region {_show(self.region.name)}: "
                "make it larger"
            )
        self.region.write(self.offset, content)


R = TypeVar("R", bound=Region)


class Regions:
    """The regions that are registered; every method may be called from any thread.

    Parameters
    ----------
    allowed
        Whether memory is shared at all; if not, every method raises `SharedMemoryOffError`.

    """

    def __init__(self, *, allowed: bool) -> None:
        self.allowed = allowed
        self._lock = threading.Lock()
        self._regions: dict[str, Region] = {}

    def check_allowed(self) -> None:
        """Refuse to share memory unless the server was told to.

        Raises
        ------
        SharedMemoryOffError
            It was not.

        """
        if not self.allowed:
            raise SharedMemoryOffError("memory is not shared: start sdrt serve with --allow-shared-memory")

    def register(self, name: str, key: str, offset: int, byte_size: int) -> SystemRegion:
        """Register a part of a POSIX shared memory object.

        Parameters
        ----------
        name
            How it is called from now on.
        key
            The object's name, as given to ``shm_open``: a slash, which may be left out, and no others.
        offset, byte_size
            Where in the object the region begins, and how large it is; both in bytes.

        Raises
        ------
        RegionError
            There is no such object, it is smaller than that, or it is not this user's to read and write; the name is
            empty, or there are too many regions.
        RegionExistsError
            The name is taken.
        SharedMemoryOffError
            The server was not told to share memory.

        """
        return self.add(name, lambda: _region(name, key, offset, byte_size))

    def add(self, name: str, make: Callable[[], R]) -> R:
        """Register what is made under a name, which is free.

        Raises
        ------
        RegionError
            As `register`, and what `make` raises.

        """
        self.check_allowed()
        if not name:
            raise RegionError("the name of a shared memory region is empty: give it one")
        with self._lock:
            self._check_free(name)
        region = make()
        with self._lock:
            self._check_free(name)
            self._regions[name] = region
        return region

    def unregister(self, name: str | None, kind: type[Region] = SystemRegion) -> None:
        """Forget a region, or all of a kind if `name` is None. One that is not registered need not be forgotten.

        Raises
        ------
        SharedMemoryOffError
            The server was not told to share memory.

        """
        self.check_allowed()
        with self._lock:
            for each in [
                each for each in self._regions.values() if isinstance(each, kind) and name in {None, each.name}
            ]:
                del self._regions[each.name]

    def status(self, name: str | None = None, kind: type[R] = SystemRegion) -> list[R]:  # type: ignore[assignment]
        """Give one region, or all of a kind if `name` is None.

        Raises
        ------
        RegionMissingError
            There is none of that name and kind.
        SharedMemoryOffError
            The server was not told to share memory.

        """
        self.check_allowed()
        with self._lock:
            if name is not None and not isinstance(self._find(name), kind):
                raise RegionMissingError(
                    f"shared memory region {_show(name)} is of another kind: ask for that one's status"
                )
            return [each for each in self._regions.values() if isinstance(each, kind) and name in {None, each.name}]

    def view(self, name: str, offset: int, byte_size: int) -> View:
        """Give a part of a region, to be read or written.

        Parameters
        ----------
        name
            Of the region.
        offset, byte_size
            Of the part, in the region; both in bytes.

        Raises
        ------
        RegionMissingError
            There is none of that name.
        RegionError
            The region is smaller than that.
        SharedMemoryOffError
            The server was not told to share memory.

        """
        self.check_allowed()
        with self._lock:
            region = self._find(name)
        if offset < 0 or byte_size < 0 or offset + byte_size > region.byte_size:
            raise RegionError(
                f"{byte_size} bytes from {offset} on are asked of shared memory region {_show(name)}: expected a part "
                f"of its {region.byte_size} bytes"
            )
        return View(region, offset, byte_size)

    def borrow(self, key: str, offset: int, byte_size: int) -> View:
        """Give a part of a POSIX shared memory object that is not registered, for as long as the view is kept.

        Parameters
        ----------
        key, offset, byte_size
            As for `register`.

        Raises
        ------
        RegionError
            There is no such object, it is smaller than that, or it is not this user's to read and write.
        SharedMemoryOffError
            The server was not told to share memory.

        """
        self.check_allowed()
        return View(_region(key, key, offset, byte_size), 0, byte_size)

    def _check_free(self, name: str) -> None:
        if name in self._regions:
            raise RegionExistsError(f"shared memory region {_show(name)} is registered already: unregister it first")
        if len(self._regions) >= MOST_REGIONS:
            raise RegionError(f"{MOST_REGIONS} shared memory regions are registered: unregister some first")

    def _find(self, name: str) -> Region:
        if (region := self._regions.get(name)) is None:
            raise RegionMissingError(f"no shared memory region is called {_show(name)}: register it first")
        return region


def _region(name: str, key: str, offset: int, byte_size: int) -> SystemRegion:
    region = SystemRegion(name, key, offset, byte_size, _open(key))
    size = os.fstat(region.descriptor).st_size
    if offset < 0 or byte_size < 1 or offset + byte_size > size:
        raise RegionError(
            f"shared memory region {_show(name)} is to have {byte_size} bytes from {offset} on: expected at least "
            f"1 of the {size} that {_show(key)} has"
        )
    return region


def _open(key: str) -> int:
    """Open an object by its name and by nothing that leads elsewhere: neither path nor link, pipe nor device."""
    name = key.removeprefix("/")
    if not name or "/" in name or "\0" in name or name in {".", ".."}:
        raise RegionError(
            f"the key is {_show(key)}: expected the name of a POSIX shared memory object, such as /pixels"
        )
    try:
        descriptor = os.open(f"{_FOLDER}/{name}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, UnicodeEncodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no such name"
        raise RegionError(
            f"shared memory object {_show(key)} cannot be opened ({why}): expected one that this user may write"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RegionError(f"{_show(key)} is no shared memory object: expected one that shm_open has made")
    return descriptor


def _show(text: str) -> str:
    return repr(text[:_SHOWN])
