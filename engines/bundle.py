"""A bundle on disk: the names of its files, and :class:`Bundle`, which opens and verifies one.

This module needs the standard library alone, so that a run starts fast.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..errors import BundleCorruptError, BundleNotFoundError
from .manifest import Component, FileEntry, Manifest
from .manifest_parser import parse_manifest

MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"

#: Far more than a manifest needs; what is larger is something else and is not read into memory.
_LARGEST_MANIFEST = 4 * 2**20
_CHUNK = 2**20

Progress = Callable[[int], object]


def onnx_name(component: str) -> str:
    """Name the file of a component's ONNX graph."""
    return f"{component}.onnx"


def onnx_data_name(component: str) -> str:
    """Name the file of the weights that stand outside a component's ONNX graph."""
    return f"{component}.onnx.data"


def merged_name(component: str) -> str:
    """Name the file of a component's ONNX graph with attention as one node, for onnxruntime."""
    return f"{component}.merged.onnx"


def plan_name(component: str) -> str:
    """Name the file of a component's engine."""
    return f"{component}.plan"


def layers_name(component: str) -> str:
    """Name the file that lists the layers of a component's engine."""
    return f"{component}.layers.json"


def hash_file(folder: Path, path: str, progress: Progress | None = None) -> FileEntry:
    """Describe one file of a bundle that is being built.

    Parameters
    ----------
    folder
        The bundle's folder.
    path
        The file, relative to the folder, with ``/``.
    progress
        Called with the number of bytes of each piece that has been hashed.

    """
    file = folder / path
    digest, size = _sha256(file, progress)
    return FileEntry(path=path, bytes=size, sha256=digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``bundle.json``, last of all files, after reading it back as any reader will.

    Raises
    ------
    BundleCorruptError
        The manifest would not be read again: a field is out of its range.

    """
    try:
        text = manifest.to_json()
    except ValueError:
        raise BundleCorruptError(f"{MANIFEST} cannot hold a figure that is not a number: measure it again") from None
    parse_manifest(text)
    (folder / MANIFEST).write_text(text, encoding="ascii", newline="\n")


@dataclass(frozen=True)
class Bundle:
    """A folder with ``bundle.json`` and the files that it names. Nothing in it changes after it is built.

    Attributes
    ----------
    folder
        Absolute path, links resolved.
    manifest
        What ``bundle.json`` says.

    """

    folder: Path
    manifest: Manifest

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read the manifest and check nothing else: for :meth:`problems`, which wants to tell all that is wrong.

        Raises
        ------
        BundleNotFoundError
            There is no folder at ``path``.
        BundleCorruptError
            ``bundle.json`` is missing or not valid.

        """
        try:
            folder = Path(path).resolve()
            is_folder = folder.is_dir()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL
            raise BundleNotFoundError(f"{os.fspath(path)!r} cannot be opened as a bundle: {error}") from None
        if not is_folder:
            found = "a file" if folder.exists() else "not there"
            raise BundleNotFoundError(f"{folder} is {found}, expected a bundle's folder: run sdrt list to see bundles")
        try:
            return cls(folder, parse_manifest(_manifest_text(folder)))
        except BundleCorruptError as error:
            raise BundleCorruptError(f"{folder} is no whole bundle: {error}: copy or build it again") from None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a bundle: read its manifest and check that every file is there with its exact size.

        Raises
        ------
        BundleNotFoundError
            There is no folder at ``path``.
        BundleCorruptError
            ``bundle.json`` is missing or not valid, or files are missing, of another size, or outside the folder; the
            message names all of them with expected and found bytes.

        """
        bundle = cls.read(path)
        bundle.check_sizes()
        return bundle

    @property
    def name(self) -> str:
        """The folder's name, which is what ``--bundle`` takes."""
        return self.folder.name

    @property
    def size(self) -> int:
        """Bytes of all files but ``bundle.json``."""
        return sum(entry.bytes for entry in self.manifest.files)

    def component(self, name: str) -> Component:
        """Find a component by its name.

        Raises
        ------
        BundleCorruptError
            The bundle has no such component.

        """
        for component in self.manifest.components:
            if component.name == name:
                return component
        held = ", ".join(component.name for component in self.manifest.components)
        raise BundleCorruptError(f"{self.folder} has no {name}, only {held}: build the bundle again")

    def merged_graph(self, component: Component) -> FileEntry:
        """Give the graph that onnxruntime runs: the one with attention as one node, or the only one."""
        merged = merged_name(component.name)
        return next((entry for entry in component.files if entry.path == merged), component.graph)

    def has(self, name: str) -> bool:
        """Tell whether there is a component of that name."""
        return any(component.name == name for component in self.manifest.components)

    def path(self, entry: FileEntry) -> Path:
        """Give the absolute path of a file of this bundle.

        Raises
        ------
        BundleCorruptError
            The path leads out of the folder through a link.

        """
        return _inside(self.folder, entry.path)

    def check_sizes(self) -> None:
        """Check that every file is there with its exact size; raises :class:`BundleCorruptError` naming all others."""
        self._raise(filter(None, map(self._size_problem, self.manifest.files)))

    def problems(self, progress: Progress | None = None) -> Iterator[str]:
        """Find all that is wrong with the files: missing, other size, other SHA-256, or not in the manifest.

        Parameters
        ----------
        progress
            Called with the number of bytes of each piece that has been hashed, ``size`` in all if the bundle is whole.

        """
        yield from self._file_problems(self.manifest.files, progress)
        known = {MANIFEST, *(entry.path for entry in self.manifest.files)}
        for found in sorted(_walk(self.folder)):
            if found not in known:
                yield f"{found} is not in the manifest"

    def verify(self, progress: Progress | None = None) -> None:
        """Check every file's SHA-256, and that there are no other files.

        Raises
        ------
        BundleCorruptError
            Names every problem at once.

        """
        self._raise(self.problems(progress))

    def verify_component(self, name: str, progress: Progress | None = None) -> None:
        """Check the SHA-256 of one component's files, as is due before an engine is deserialised.

        Raises
        ------
        BundleCorruptError
            Names every file that is not as it was built.

        """
        self._raise(self._file_problems(self.component(name).files, progress))

    def _raise(self, problems: Iterable[str]) -> None:
        if found := list(problems):
            raise BundleCorruptError(f"{self.folder} is damaged: {'; '.join(found)}: copy or build it again")

    def _file_problems(self, entries: Iterable[FileEntry], progress: Progress | None) -> Iterator[str]:
        for entry in entries:
            if problem := self._size_problem(entry):
                yield problem
                continue
            try:
                digest, _ = _sha256(self.path(entry), progress)
            except OSError as error:
                yield f"{entry.path} cannot be read ({error.strerror})"
                continue
            if digest != entry.sha256:
                yield f"{entry.path} has SHA-256 {digest}, expected {entry.sha256}"

    def _size_problem(self, entry: FileEntry) -> str | None:
        try:
            path = self.path(entry)
            found = path.stat().st_size
        except BundleCorruptError as error:
            return str(error)
        except OSError as error:
            return f"{entry.path} is missing ({error.strerror}), expected {entry.bytes} bytes"
        if not path.is_file():
            return f"{entry.path} is not a file"
        return None if found == entry.bytes else f"{entry.path} has {found} bytes, expected {entry.bytes}"


def _inside(folder: Path, path: str) -> Path:
    """Follow links and refuse to leave the folder, so that a stranger's bundle opens none of the user's own files."""
    try:
        resolved = (folder / path).resolve()
    except (OSError, RuntimeError) as error:
        raise BundleCorruptError(f"{path} is a link that leads nowhere ({error})") from None
    if not resolved.is_relative_to(folder):
        raise BundleCorruptError(f"{path} is a link out of the bundle, to {resolved}")
    return resolved


def _manifest_text(folder: Path) -> bytes:
    path = _inside(folder, MANIFEST)
    if path.exists() and not path.is_file():  # a pipe would block for ever
        raise BundleCorruptError(f"{MANIFEST} is not a file")
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_MANIFEST + 1)
    except OSError as error:
        raise BundleCorruptError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    if len(text) > _LARGEST_MANIFEST:
        raise BundleCorruptError(f"{MANIFEST} has over {_LARGEST_MANIFEST} bytes, far more than any manifest")
    return text


def _walk(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(root) / name).relative_to(folder).as_posix()


def _sha256(file: Path, progress: Progress | None) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest(), size
