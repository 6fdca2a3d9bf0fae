"""Checkpoints on the Hugging Face hub: which files are needed, and downloads that survive an interruption."""

from __future__ import annotations

import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from ..errors import DiskSpaceError, DownloadError, MissingDependencyError
from .download import download, remember
from .folder import INDEX, choose_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Progress = Callable[[str, int, int], None]

SHORT_NAMES: Final = {
    **{f"v1-{minor}": f"CompVis/stable-diffusion-v1-{minor}" for minor in range(1, 5)},
    "v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
"""The repositories of Stable Diffusion v1, as diffusers folders."""

_WORD: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_SPEC: Final = re.compile(rf"({_WORD}/{_WORD})(?::([^@:\\]{{1,200}}))?(?:@([A-Za-z0-9._/-]{{1,200}}))?")
_WEIGHTS: Final = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class HubSpec:
    """A repository of the hub, and what of it.

    Attributes
    ----------
    repo
        ``owner/name``.
    revision
        A branch, tag or commit.
    file
        One original file in it; empty to choose.
    name
        What to call the model.

    """

    repo: str
    revision: str
    file: str
    name: str


@dataclass(frozen=True)
class Fetched:
    """A model that is on this machine now: the folder or file, and ``owner/name@commit``."""

    path: Path
    source: str


@dataclass(frozen=True)
class _Remote:
    commit: str
    sizes: Mapping[str, int]
    """Each file of the repository and its bytes (0 where the hub does not say)."""


def parse_hub_spec(spec: str) -> HubSpec | None:
    """Read ``v1-1``, ``owner/name``, ``owner/name@revision`` or ``owner/name:file.ckpt@revision``.

    Returns
    -------
    HubSpec or None
        None where it is none of these, such as a path to a file.

    """
    short, _, revision = spec.partition("@")
    if short in SHORT_NAMES:
        return HubSpec(SHORT_NAMES[short], revision or "main", "", short)
    match = _SPEC.fullmatch(spec)
    if match is None or ".." in spec or "--" in match[1]:
        return None
    repo, file, name = match[1], match[2] or "", match[1].split("/")[1]
    if name.endswith(_WEIGHTS):
        return None  # a path that does not exist
    return HubSpec(repo, match[3] or "main", file, file.rpartition("/")[2].rpartition(".")[0] or name)


def _choose(files: Sequence[str], spec: HubSpec, *, ema: bool) -> tuple[str, ...]:
    """Choose what to download."""
    if spec.file:
        if spec.file not in files:
            raise DownloadError(f"{spec.repo} has no file {spec.file!r} at {spec.revision}")
        return (spec.file,)
    if INDEX in files:
        return choose_files(files, spec.repo, ema=ema).files
    whole = [name for name in files if "/" not in name and name.endswith((".safetensors", ".ckpt"))]
    # The same weights in both formats: the one without code.
    whole = [name for name in whole if name.endswith(".safetensors") or f"{name[:-5]}.safetensors" not in whole]
    if len(whole) == 1:
        return (whole[0],)
    if not whole:
        raise DownloadError(
            f"{spec.repo} holds no Stable Diffusion checkpoint: neither {INDEX} nor a .safetensors/.ckpt"
        )
    raise DownloadError(f"{spec.repo} holds {len(whole)} checkpoints: choose one as {spec.repo}:{min(whole)}")


def fetch(spec: HubSpec, *, ema: bool, progress: Progress) -> Fetched:
    """Bring what is needed of a repository into Hugging Face's cache, resuming what was begun before.

    Honours ``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` as every Hugging Face tool does.

    Parameters
    ----------
    spec
        Which repository.
    ema
        Averaged weights are wanted.
    progress
        Called with what is being done, bytes done, and bytes in all.

    Raises
    ------
    DownloadError
        If the repository, the revision or the network is not there, or access is not granted.
    DiskSpaceError
        If the files do not fit on the disk.

    """
    try:
        import huggingface_hub  # noqa: F401, PLC0415 - a third of a second that local files need not pay
    except ImportError:
        raise MissingDependencyError("huggingface_hub", "downloading a checkpoint", "export") from None
    remote = _list_remote(spec)
    if remote is None:
        return _from_cache(spec, ema=ema)
    names = _choose(tuple(remote.sizes), spec, ema=ema)
    missing = [name for name in names if _cached(spec, remote.commit, name) is None]
    total = sum(remote.sizes[name] for name in missing)
    _check_space(total, spec)
    with _translated(spec):
        remember(spec.repo, spec.revision, remote.commit)
    done = 0
    for name in missing:

        def advance(count: int, what: str = f"Downloading {spec.repo}/{name}") -> None:
            nonlocal done
            done += count
            progress(what, done, max(total, done))

        try:
            with _translated(spec):
                download(spec.repo, remote.commit, name, advance)
        except _UnreachableError as error:
            raise DownloadError(
                f"the connection broke at {done} of {total} bytes of {spec.repo}: run the same again to go on there"
            ) from error.__cause__
    paths = [_cached(spec, remote.commit, name) for name in names]
    if None in paths:
        raise DownloadError(f"{spec.repo} was downloaded, but its files are not in the cache; is the cache writable?")
    return Fetched(_root(names, [path for path in paths if path]), f"{spec.repo}@{remote.commit}")


def _root(names: Sequence[str], paths: Sequence[Path]) -> Path:
    """Return the snapshot's folder of a diffusers model, or the one file."""
    return paths[names.index(INDEX)].parent if INDEX in names else paths[0]


def _cached(spec: HubSpec, commit: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    found = try_to_load_from_cache(spec.repo, name, revision=commit)
    return Path(found) if isinstance(found, str) else None


def _list_remote(spec: HubSpec) -> _Remote | None:
    """Ask the hub what the repository holds; None where there is no hub to ask."""
    from huggingface_hub import HfApi, constants  # noqa: PLC0415

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        with _translated(spec):
            info = HfApi().model_info(spec.repo, revision=spec.revision, files_metadata=True, timeout=30)
    except _UnreachableError:
        return None
    if not info.sha or not info.siblings:
        raise DownloadError(f"{spec.repo} at {spec.revision} is empty")
    return _Remote(info.sha, {one.rfilename: one.size or 0 for one in info.siblings})


def _from_cache(spec: HubSpec, *, ema: bool) -> Fetched:
    """Take what an earlier download left, where the hub cannot be asked."""
    from huggingface_hub import constants, snapshot_download  # noqa: PLC0415

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
    advice = "unset it" if constants.HF_HUB_OFFLINE else "check the network, or set HF_ENDPOINT to a mirror"
    try:
        folder = Path(snapshot_download(spec.repo, revision=spec.revision, local_files_only=True))
    except Exception as error:
        raise DownloadError(
            f"{spec.repo} is not in the cache ({constants.HF_HUB_CACHE}) and {why}: {advice}"
        ) from error
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        names = _choose(files, spec, ema=ema)
    except ValueError as error:
        raise DownloadError(f"{spec.repo} is in the cache only in part and {why}: {advice} ({error})") from None
    return Fetched(_root(names, [folder / name for name in names]), f"{spec.repo}@{folder.name}")


def _check_space(total: int, spec: HubSpec) -> None:
    from huggingface_hub import constants  # noqa: PLC0415

    place = Path(constants.HF_HUB_CACHE)
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if total > free:
        raise DiskSpaceError(f"{spec.repo} needs {total} bytes in {constants.HF_HUB_CACHE}, {free} are free")


class _UnreachableError(Exception):
    """No hub answers."""


@contextmanager
def _translated(spec: HubSpec) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP library raise into one line that says what to do."""
    try:
        yield
    except (DownloadError, DiskSpaceError):
        raise
    except Exception as error:  # noqa: BLE001 - the HTTP library and its errors differ between versions
        _explain(spec, error)


def _explain(spec: HubSpec, error: Exception) -> NoReturn:
    from huggingface_hub import constants, errors  # noqa: PLC0415

    page = f"{constants.ENDPOINT}/{spec.repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        raise DownloadError(
            f"{spec.repo} asks for an agreement: accept it at {page}, then run hf auth login or set HF_TOKEN"
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise DownloadError(f"{spec.repo} has no revision {spec.revision!r}: see {page}/commits/main") from error
    if isinstance(error, errors.RepositoryNotFoundError) or status in {401, 404}:
        raise DownloadError(
            f"{spec.repo} is not on {constants.ENDPOINT}, or it is private (then set HF_TOKEN), and no file or "
            "folder here has that name"
        ) from error
    if isinstance(error, OSError) and error.errno == 28:
        raise DiskSpaceError(f"{spec.repo}: no space is left in {constants.HF_HUB_CACHE}") from error
    if isinstance(error, errors.HfHubHTTPError):
        raise DownloadError(f"{constants.ENDPOINT} answered {status} for {spec.repo}: try again later") from error
    if isinstance(error, PermissionError):
        raise DownloadError(f"{error.filename} cannot be written: set HF_HOME to a folder that can") from error
    if isinstance(error, errors.OfflineModeIsEnabled) or _is_network(error):
        raise _UnreachableError from error
    reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    raise DownloadError(f"{spec.repo} could not be downloaded: {reason}") from error


def _is_network(error: BaseException) -> bool:
    """Whether an error is of the kind that a network makes, in whichever HTTP library."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "Timeout", "TimeoutException"})
