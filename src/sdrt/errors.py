"""Everything sdrt raises on purpose.

::

    SdrtError
    ├── InputError             (ValueError)         an argument or option that makes no sense; exit code 2
    ├── CheckpointError        (ValueError)         a checkpoint that is damaged or is not Stable Diffusion v1
    │   └── UnsafeCheckpointError                   a checkpoint that would run code, or ask for absurd memory
    ├── DownloadError          (OSError)            a model hub that did not answer, or lacks the file
    ├── ExportError            (RuntimeError)       a graph that could not be traced, or strays from its reference
    ├── BundleError            (ValueError)
    │   ├── BundleNotFoundError                     no bundle of that name or at that path
    │   ├── BundleCorruptError                      a file is missing, cut short, altered, or points outside the folder
    │   ├── BundleExistsError                       the name is taken, and --force was not given
    │   └── BundleBusyError                         another process is building the very same bundle
    ├── BackendError           (RuntimeError)       an engine that does not load or fails while it runs
    │   └── DeviceMemoryError  (MemoryError)        a GPU with too little free memory; the next request may succeed
    ├── MissingDependencyError (ImportError)        a package is needed that is not installed
    └── DiskSpaceError         (OSError)            not enough room for what is about to be written

A message is one line: what was found, what was expected, and what to do.
"""

from __future__ import annotations

from typing import Self


class SdrtError(Exception):
    """Root of every error that sdrt raises on purpose."""


class SdrtWarning(UserWarning):
    """Something was done that the caller may not expect, such as a prompt cut at 75 tokens."""


class InputError(SdrtError, ValueError):
    """An argument or option that makes no sense; the command line exits with 2."""


class CheckpointError(SdrtError, ValueError):
    """A checkpoint that is damaged or is not Stable Diffusion v1."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint that would run code when loaded, or ask for absurd amounts of memory."""


class DownloadError(SdrtError, OSError):
    """A model hub that did not answer, or does not have the file."""


class ExportError(SdrtError, RuntimeError):
    """A graph that could not be traced, or whose output strays from the reference."""


class BundleError(SdrtError, ValueError):
    """Root of what can be wrong with a bundle."""


class BundleNotFoundError(BundleError):
    """There is no bundle of that name or at that path."""


class BundleCorruptError(BundleError):
    """A file of the bundle is missing, cut short, altered, or points outside the folder."""


class BundleExistsError(BundleError):
    """The bundle exists already and replacing it was not asked for."""


class BundleBusyError(BundleError):
    """Another process is building the very same bundle."""


class BackendError(SdrtError, RuntimeError):
    """An engine that does not load, or fails while it runs."""


class DeviceMemoryError(BackendError, MemoryError):
    """The GPU has too little free memory. The request fails; the next one may succeed.

    Attributes
    ----------
    asked, free
        In bytes; None where the library that failed does not tell.

    """

    def __init__(self, message: str, asked: int | None = None, free: int | None = None) -> None:
        super().__init__(message)
        self.asked = asked
        self.free = free

    @classmethod
    def of(cls, asked: int, free: int, purpose: str) -> Self:
        """Say how much was asked for, what for (a noun phrase), and how much there is."""
        return cls(
            f"{purpose}: {asked} bytes of GPU memory are needed and {free} are free: "
            "ask for fewer or smaller images at once, or end what else uses the GPU",
            asked,
            free,
        )


class MissingDependencyError(SdrtError, ImportError):
    """A package is needed that is not installed.

    Parameters
    ----------
    package
        What could not be imported.
    purpose
        What it was needed for, as a noun phrase.
    extra
        The extra of sdrt that installs it.

    """

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(f"{package} is not installed and {purpose} needs it: run pip install 'sdrt[{extra}]'")
        self.package = package
        self.extra = extra


class DiskSpaceError(SdrtError, OSError):
    """There is not enough room for what is about to be written."""
