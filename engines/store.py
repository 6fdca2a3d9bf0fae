"""The place where bundles are kept, and finding one there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BundleError, BundleNotFoundError, InputError
from . import demo
from .bundle import MANIFEST, Bundle
from .devices import nvidia_gpus
from .manifest_parser import NAME
from .publish import recover, recover_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .manifest import Manifest, Precision

#: Tells why this machine cannot run a bundle, or ``None`` if it can.
Obstacle = Callable[[Bundle], str | None]


@dataclass(frozen=True)
class Listing:
    """One folder of the store: either the bundle, or what is wrong with it in one line."""

    name: str
    path: Path
    bundle: Bundle | None
    problem: str | None


def home() -> Path:
    """Give the folder where sdrt keeps what it makes: ``SDRT_HOME``, or the platform's cache folder."""
    if given := os.environ.get("SDRT_HOME"):
        return Path(given).expanduser().absolute()
    import platformdirs  # noqa: PLC0415 - a run with --bundle DIR does without

    return Path(platformdirs.user_cache_dir("sdrt", appauthor=False))


def bundles_folder() -> Path:
    """Give the folder of the store's bundles; it may not exist yet."""
    return home() / "bundles"


def check_name(name: str) -> str:
    """Return ``name`` if a bundle can be called so: letters, digits, ``.``, ``_``, ``-``, at most 100.

    Raises
    ------
    InputError
        It cannot.

    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name[:120]!r} is no name for a bundle: take up to 100 letters, digits, '.', '_' and '-', "
            "the first one a letter, a digit or '_'"
        )
    return name


def title_of(output: Path | None, name: str | None, default: Callable[[], str]) -> str:
    """Choose what a bundle to be built is called: its name, else that of its folder, else what `default` gives.

    Raises
    ------
    InputError
        No bundle can have the name.

    """
    if name is not None:
        return check_name(name)
    return output.name if output is not None else default()


def place(name: str) -> Path:
    """Give the folder in the store for a bundle to be built, making the store if it is not there.

    Raises
    ------
    InputError
        No bundle can be called so, or the store cannot be made.

    """
    folder = bundles_folder()
    check_name(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be made ({error.strerror}): set SDRT_HOME to a folder that can be written"
        ) from None
    return folder / name


def list_bundles() -> list[Listing]:
    """List the store: whole bundles, the newest first, then broken ones by name.

    Raises
    ------
    InputError
        The store is there and may not be read.

    """
    folder = bundles_folder()
    try:
        recover_all(folder)
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): change its permissions or SDRT_HOME") from None
    listings = [_list_one(path) for path in paths]
    whole = [listing for listing in listings if listing.bundle is not None]
    return sorted(whole, key=_age, reverse=True) + [listing for listing in listings if listing.bundle is None]


def resolve(spec: str | os.PathLike[str] | None = None, *, obstacle: Obstacle | None = None) -> Bundle:
    """Find and open a bundle.

    Parameters
    ----------
    spec
        A bundle's name in the store, or a path. What holds a separator or begins with ``.`` or ``~`` is a path; else
        a name, and where the store has none of that name, a folder in the working directory; ``demo`` is always there,
        since it comes with sdrt. ``None`` takes the newest bundle in the store that this machine can run; should that
        be fp16 graphs, such as a build of engines leaves behind, and there is no GPU, then the fp32 graphs of the same
        model, if the store has them. int8 graphs, which make other pictures, are taken only if there is nothing else.
    obstacle
        Tells why this machine cannot run a bundle, or ``None`` if it can. It matters where ``spec`` is ``None`` alone:
        what was asked for by name is opened.

    Raises
    ------
    BundleNotFoundError
        There is none; the message lists those that exist and says how to build one.
    BundleCorruptError
        There is one and it is not whole.
    InputError
        ``spec`` is neither a name nor a path.

    """
    return _newest(obstacle) if spec is None else Bundle.open(locate(spec))


def locate(spec: str | os.PathLike[str]) -> Path:
    """Find a bundle's folder by its name or path, as :func:`resolve` does, and do not open it.

    Raises
    ------
    BundleNotFoundError
        The store has none of that name; a path is not looked at.
    InputError
        ``spec`` is neither a name nor a path.

    """
    text = os.fspath(spec)
    if "\0" in text:
        raise InputError("a bundle's name or path cannot hold a NUL")
    if not isinstance(spec, str) or _is_path(text):
        try:
            path = Path(text).expanduser()
        except RuntimeError as error:
            raise BundleNotFoundError(f"there is no bundle at {text!r}: {error}") from None
        recover(path.absolute())
        return path
    kept = bundles_folder() / check_name(text)
    recover(kept)
    for path in (kept, Path(text)):
        if path.is_dir() and (path == kept or (path / MANIFEST).exists()):
            return path
    if text == demo.NAME:
        return demo.bundle_folder(home())
    raise BundleNotFoundError(f"there is no bundle {text!r} in {bundles_folder()}: {_advice(list_bundles())}")


def _is_path(text: str) -> bool:
    return text.startswith((".", "~")) or any(mark in text for mark in (os.sep, os.altsep, "/") if mark)


def _newest(obstacle: Obstacle | None) -> Bundle:
    listings = list_bundles()
    whole = [listing.bundle for listing in listings if listing.bundle is not None]
    whole.sort(key=lambda bundle: bundle.manifest.precision == "int8")
    reasons = []
    for index, bundle in enumerate(whole):
        reason = obstacle(bundle) if obstacle is not None else None
        if reason is None:
            return _for_cpu(bundle, whole[index + 1 :])
        reasons.append(f"{bundle.name} does not run here ({reason})")
    raise BundleNotFoundError(
        f"there is no bundle that this machine can run in {bundles_folder()}: "
        + ("; ".join(reasons) + ": build one with sdrt build --ckpt v1-1" if reasons else _advice(listings))
    )


def _for_cpu(bundle: Bundle, older: Iterable[Bundle]) -> Bundle:
    """Without a GPU, give a model's fp32 graphs for its fp16 ones: a CPU needs longer for those, rounding at casts."""
    if not _is_graphs(bundle, "fp16") or nvidia_gpus():
        return bundle
    exact = (
        other for other in older if _is_graphs(other, "fp32") and _model(other.manifest) == _model(bundle.manifest)
    )
    return next(exact, bundle)


def _is_graphs(bundle: Bundle, precision: Precision) -> bool:
    return (bundle.manifest.kind, bundle.manifest.precision) == ("onnx", precision)


def _model(manifest: Manifest) -> tuple[object, ...]:
    """Tell what both precisions of a model have in common."""
    return manifest.model, manifest.latent, manifest.text, manifest.scheduler


def _advice(listings: list[Listing]) -> str:
    whole = [listing.name for listing in listings if listing.bundle is not None]
    broken = [f"{listing.name} (broken)" for listing in listings if listing.bundle is None]
    held = f"there are {', '.join(whole + broken)}" if listings else "it holds none"
    return f"{held}; build one with sdrt build --ckpt v1-1, or take the small one that comes with sdrt, {demo.NAME}"


def _list_one(path: Path) -> Listing:
    try:
        return Listing(path.name, path, Bundle.open(path), None)
    except BundleError as error:
        return Listing(path.name, path, None, str(error))


def _age(listing: Listing) -> tuple[datetime, str]:
    assert listing.bundle is not None
    return datetime.fromisoformat(listing.bundle.manifest.created), listing.name
