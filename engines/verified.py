"""Remembering which files were verified, so that gigabytes are hashed once and not at every start.

A file counts as unchanged while its size, inode, modification and change times are what they were when its SHA-256 was
found right: the comparison that git makes for its index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from typing import TYPE_CHECKING

from .manifest import weights_owner
from .store import home

if TYPE_CHECKING:
    from pathlib import Path

    from .bundle import Bundle, Progress

Stamp = list[int | str]

_writing = threading.Lock()


def verify_once(bundle: Bundle, component: str, progress: Progress | None = None) -> None:
    """Check the SHA-256 of a component's files, unless they were found right before and have not changed since.

    Weights that it shares with another component are that one's files, and are checked too.

    Parameters
    ----------
    bundle, component
        What is about to be loaded.
    progress
        Called with the bytes of each piece hashed.

    Raises
    ------
    BundleCorruptError
        Names every file that is not as it was built.

    """
    if (owner := weights_owner(component)) is not None:
        verify_once(bundle, owner, progress)
    note = _note(bundle.folder)
    known = _read(note)
    stamps = {entry.path: _stamp(bundle.path(entry), entry.sha256) for entry in bundle.component(component).files}
    if all(known.get(path) == stamp for path, stamp in stamps.items()):
        return
    bundle.verify_component(component, progress)
    _write(note, stamps)


def has_digest(file: Path, sha256: str) -> bool:
    """Tell whether a file has a SHA-256, and do not look again while it is not changed."""
    note = _note(file)
    if _read(note).get(file.name) == _stamp(file, sha256):
        return True
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != sha256:
            return False
    remember(file, sha256)
    return True


def remember(file: Path, sha256: str) -> None:
    """Take a file's SHA-256 for found right."""
    _write(_note(file), {file.name: _stamp(file, sha256)})


def _note(folder: Path) -> Path:
    return home() / "verified" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"


def _stamp(file: Path, sha256: str) -> Stamp:
    found = file.stat()
    return [sha256, found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _read(note: Path) -> dict[str, Stamp]:
    try:
        known = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(note: Path, stamps: dict[str, Stamp]) -> None:
    # Not being able to remember costs time at the next start and nothing else. Threads load components at once.
    with contextlib.suppress(OSError), _writing:
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(_read(note) | stamps), encoding="ascii")
        draft.replace(note)
