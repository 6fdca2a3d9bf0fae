"""One file from the Hugging Face hub into its cache, going on where an earlier run was cut off.

huggingface_hub resumes a download within one process but throws away what a killed one had; four gigabytes are worth
keeping. The file is written into the cache as huggingface_hub lays it out, which then finds it there and links it.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final
from urllib.parse import urlsplit

from ..errors import DownloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ETAG: Final = re.compile(r"[A-Za-z0-9_-]{1,200}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class _CountedFile:
    """A file that tells how far it has got, as much of one as `http_get` uses."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self.file = file
        self.advance = advance

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, position: int) -> int:
        self.advance(position - self.file.tell())
        return self.file.seek(position)

    def truncate(self) -> int:
        return self.file.truncate()

    def write(self, chunk: bytes) -> int:
        count = self.file.write(chunk)
        self.advance(count)
        return count


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep huggingface_hub from drawing progress bars of its own beside ours."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # noqa: PLC0415 - its lazy exports
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remember(repo: str, revision: str, commit: str) -> None:
    """Note in the cache which commit a branch or tag was at, for the time when the hub cannot be asked."""
    from huggingface_hub import constants  # noqa: PLC0415
    from huggingface_hub.file_download import repo_folder_name  # noqa: PLC0415

    if revision == commit:
        return
    reference = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit, encoding="utf-8")


def download(repo: str, commit: str, name: str, advance: Callable[[int], None]) -> None:
    """Bring one file into the cache.

    Parameters
    ----------
    repo, commit, name
        The repository ``owner/name``, a commit of it, and the file in it.
    advance
        Called with bytes as they come, and at first with those that an earlier run left.

    Raises
    ------
    DownloadError
        If the file does not have the content that the hub announced.
    Exception
        What huggingface_hub raises; `hub` translates it.

    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url  # noqa: PLC0415
    from huggingface_hub.file_download import http_get, repo_folder_name  # noqa: PLC0415
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

    url = hf_hub_url(repo, name, revision=commit)
    metadata = get_hf_file_metadata(url)
    etag, headers = metadata.etag or "", build_hf_headers()
    if not _ETAG.fullmatch(etag):
        raise DownloadError(f"{repo}/{name}: {constants.ENDPOINT} gave no usable ETag, so it is no Hugging Face hub")
    if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub, not for where it keeps its files
    folder = repo_folder_name(repo_id=repo, repo_type="model")
    blob = Path(constants.HF_HUB_CACHE) / folder / "blobs" / etag
    partial = blob.with_name(f"{etag}.sdrt.incomplete")
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / folder / f"{etag}.sdrt.lock"
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _quiet():
        with WeakFileLock(lock):
            if not blob.exists():
                partial.touch()
                with partial.open("r+b") as file:
                    begun = file.seek(0, 2)
                    advance(begun)
                    http_get(
                        metadata.location,
                        _CountedFile(file, advance),  # type: ignore[arg-type]  # the methods that it calls
                        resume_size=begun,
                        headers=headers,
                        expected_size=metadata.size,
                    )
                if begun and _SHA256.fullmatch(etag) and _sha256(partial) != etag:
                    partial.unlink()
                    raise DownloadError(f"{repo}/{name} was damaged on the way and is deleted: run the same again")
                partial.replace(blob)
        hf_hub_download(repo, name, revision=commit)
