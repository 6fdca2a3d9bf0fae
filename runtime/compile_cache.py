"""What was compiled of a bundle's graphs, kept in ``SDRT_HOME`` for the next process.

One folder a bundle, called by its hash, and in it one file a compilation, called by what was compiled, the compiler's
own id for it, and its SHA-256. The compiler itself works in a folder of its own on a copy, so that it never sees a file
that another process is writing, or one that is damaged.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..engines import store
from ..engines.bundle import Bundle
from ..engines.verified import has_digest, remember
from ..errors import BundleError, InputError, SdrtWarning

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIMIT_VARIABLE = "SDRT_COMPILED_MB"
"""Changes how many megabytes all compilations of all bundles may take; with 0 none is kept."""
_LIMIT_MB = 4000

_BUNDLES = "bundles"
"""Names the file that lists the folders of the bundles that a cache is of."""
_SCRATCH = ".compiling-"
_WHOLE = "whole"
_STALE_S = 24 * 3600
_DIGEST = 16


class CompileCache:
    """The compilations of one bundle; what goes wrong with it is warned of and stops nothing.

    Parameters
    ----------
    bundle
        Its graphs are what is compiled.
    compiler
        Names the folder of all that it compiles.

    Raises
    ------
    InputError
        The limit that the environment gives is no number.

    """

    def __init__(self, bundle: Bundle, compiler: str) -> None:
        self._limit = _limit()
        self._bundle = bundle
        self._root = store.home() / "compiled" / compiler
        self._folder = self._root / _hash(bundle)
        self._usable = self._limit > 0

    @contextmanager
    def entry(self, name: str) -> Iterator[Path | None]:
        """Lend the compiler a folder that holds what was kept under a name, and keep what is in it afterwards.

        Parameters
        ----------
        name
            Of the compilation: letters, digits, ``_`` and ``-``.

        Yields
        ------
        Path or None
            None if nothing can be kept.

        """
        with ExitStack() as stack:
            folder, known = None, set[str]()
            try:
                if self._usable:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    # Windows does not remove files that are mapped; whoever makes room later does.
                    scratch = tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=self._folder, ignore_cleanup_errors=True)
                    folder = Path(stack.enter_context(scratch))
                    known = self._take(name, folder)
            except OSError as error:
                self._give_up(error)
                folder = None
            yield folder
            if folder is None:
                return
            try:
                self._keep(name, folder, known)
            except OSError as error:
                self._give_up(error)

    def file(self, name: str) -> Path | None:
        """Find the large file that was kept under a name; it is hashed when it has changed, and not at each start."""
        if not self._usable:
            return None
        for blob in self._folder.glob(f"{name}.{_WHOLE}.*.blob"):
            digest = blob.suffixes[-2][1:]
            try:
                if has_digest(blob, digest):
                    with suppress(OSError):
                        os.utime(blob)
                        remember(blob, digest)  # with the new time
                    return blob
                warnings.warn(f"{blob} is damaged: it is made anew", SdrtWarning, stacklevel=4)
                blob.unlink()
            except OSError:  # another process has replaced it, or nothing can be written there
                continue
        return None

    def keep_file(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Keep a large file under a name, made of some parts."""
        size = sum(memoryview(part).nbytes for part in parts)
        if not self._usable or not self._fits(name, size):
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=self._folder, ignore_cleanup_errors=True) as folder:
                draft, hashed = Path(folder) / "draft", hashlib.sha256()
                if shutil.disk_usage(folder).free <= size:
                    return
                with draft.open("wb") as file:
                    for part in parts:
                        file.write(part)
                        hashed.update(part)
                for old in self._folder.glob(f"{name}.{_WHOLE}.*.blob"):
                    old.unlink(missing_ok=True)
                kept = self._folder / f"{name}.{_WHOLE}.{hashed.hexdigest()}.blob"
                draft.replace(kept)
                remember(kept, hashed.hexdigest())
                self._note()
                with suppress(OSError):  # others clean up as well
                    self._make_room()
        except OSError as error:
            self._give_up(error)

    def _fits(self, name: str, size: int) -> bool:
        if size > self._limit:
            warnings.warn(
                f"what was compiled as {name} takes {size / 1e6:.0f} MB, and {LIMIT_VARIABLE} allows "
                f"{self._limit / 1e6:.0f}, so that it is compiled anew at each start: raise it",
                SdrtWarning,
                stacklevel=4,
            )
        return size <= self._limit

    def _give_up(self, error: OSError) -> None:
        self._usable = False
        warnings.warn(
            f"{self._folder} cannot be written ({error.strerror}), so that graphs are compiled anew at each start: "
            "change its permissions, or set SDRT_HOME to a folder that can be written",
            SdrtWarning,
            stacklevel=3,
        )

    def _take(self, name: str, folder: Path) -> set[str]:
        """Copy what was kept into a folder and return the digests, leaving out what is damaged."""
        known = set()
        for blob in self._folder.glob(f"{name}.*.blob"):
            number, _, digest = blob.name[len(name) + 1 : -len(".blob")].partition(".")
            try:
                content = blob.read_bytes()
            except OSError:  # another process has replaced it
                continue
            if _digest(content) == digest:
                known.add(digest)
                (folder / f"{number}.blob").write_bytes(content)
                with suppress(OSError):
                    os.utime(blob)
                continue
            warnings.warn(f"{blob} is damaged: it is compiled anew", SdrtWarning, stacklevel=4)
            with suppress(OSError):
                blob.unlink()
        return known

    def _keep(self, name: str, folder: Path, known: set[str]) -> None:
        """Move what is new in a folder to its place."""
        for blob in folder.glob("*.blob"):
            size = blob.stat().st_size
            if not self._fits(name, size):
                continue
            if (digest := _digest(blob.read_bytes())) not in known and _is_whole(blob, size):
                for old in self._folder.glob(f"{name}.{blob.stem}.*.blob"):
                    old.unlink(missing_ok=True)
                blob.chmod(0o644)
                blob.replace(self._folder / f"{name}.{blob.stem}.{digest}.blob")
                self._note()
                with suppress(OSError):  # others clean up as well
                    self._make_room()

    def _note(self) -> None:
        """Remember whose compilations these are."""
        note = self._folder / _BUNDLES
        path = os.fsencode(self._bundle.folder)
        if not note.exists() or path not in note.read_bytes().splitlines():
            with note.open("ab") as file:
                file.write(path + b"\n")

    def _make_room(self) -> None:
        """Remove what is of bundles that are gone, what killed processes left, and beyond the limit the least used."""
        for folder in self._root.iterdir():
            if folder != self._folder and not _is_in_use(folder):
                shutil.rmtree(folder, ignore_errors=True)
        for left in self._root.glob(f"*/{_SCRATCH}*"):
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)
        kept = sorted(((blob.stat(), blob) for blob in self._root.glob("*/*.blob")), key=lambda each: each[0].st_mtime)
        total = sum(found.st_size for found, _ in kept)
        for found, blob in kept:
            if total <= self._limit:
                break
            blob.unlink(missing_ok=True)
            total -= found.st_size


def _limit() -> int:
    """Give the limit in bytes."""
    given = os.environ.get(LIMIT_VARIABLE, "").strip() or str(_LIMIT_MB)
    if not given.isdecimal():
        raise InputError(f"{LIMIT_VARIABLE} is {given!r}: expected a number of megabytes, or 0 to keep no compilation")
    return int(given) * 10**6


def _hash(bundle: Bundle) -> str:
    """Give a bundle's hash: that of the hashes of its files."""
    return _digest("".join(entry.sha256 for entry in bundle.manifest.files).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGEST]


def _is_whole(blob: Path, size: int) -> bool:
    """Tell whether there was room for all of a file: its writer does not look whether the disk is full."""
    return shutil.disk_usage(blob.parent).free > size


def _is_in_use(folder: Path) -> bool:
    """Tell whether a bundle that a folder's compilations are of is still there, and still the same."""
    try:
        paths = (folder / _BUNDLES).read_bytes().splitlines()
    except OSError:  # somebody has begun and not come to the end
        return time.time() - folder.stat().st_mtime < _STALE_S
    return any(_has_hash(os.fsdecode(path), folder.name) for path in paths)


def _has_hash(path: str, wanted: str) -> bool:
    try:
        return _hash(Bundle.read(path)) == wanted
    except BundleError:
        return False
