"""What many tests share: one small checkpoint and the bundles built of it, each made once a session."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench.checkpoints import write_checkpoint

from sdrt.engines.bundle import Bundle
from sdrt.engines.lock import locked

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdrt.engines.manifest import TracedPrecision


@pytest.fixture(scope="session")
def workshop(request: pytest.FixtureRequest) -> Path:
    """A folder for what takes a minute to make, kept in pytest's cache while the code that makes it is the same."""
    cache = request.config.cache
    assert cache is not None
    root = Path(__file__).parents[1]
    sources = [root / "constraints.txt", root / "bench" / "checkpoints.py", *sorted((root / "export").glob("*.py"))]
    sources += [
        root / "engines" / name
        for name in (
            "attention.py",
            "bundle.py",
            "cut.py",
            "decoder_parts.py",
            "manifest.py",
            "prune.py",
            "publish.py",
            "shallow.py",
            "unet_parts.py",
        )
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = cache.mkdir("workshop")
    for other in folder.iterdir():
        # Another session may be at work with the sources that we had yesterday.
        if other.name != digest and time.time() - other.stat().st_mtime > 24 * 3600:
            shutil.rmtree(other)
    (folder / digest).mkdir(exist_ok=True)
    return folder / digest


def make_once(place: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder unless it is there; of several sessions at once, one makes it and the others wait."""
    with locked(place.with_name(f".{place.name}.lock"), str(place), patience_s=math.inf):
        if not place.exists():
            draft = place.with_name(f".{place.name}.draft")
            shutil.rmtree(draft, ignore_errors=True)
            make(draft)
            draft.rename(place)
    return place


@pytest.fixture(scope="session")
def tiny_checkpoint(workshop: Path) -> Path:
    """A diffusers folder of Stable Diffusion v1's architecture, small, with random weights."""
    return make_once(workshop / "tiny", lambda place: write_checkpoint(place, "diffusers", "tiny", seed=0))


def build_once(checkpoint: Path, output: Path, precision: TracedPrecision) -> Path:
    def build_it(place: Path) -> None:
        from sdrt.export.build import build

        build(str(checkpoint), output=place, name=output.name, precision=precision)

    return make_once(output, build_it)


@pytest.fixture(scope="session")
def tiny_bundle(workshop: Path, tiny_checkpoint: Path) -> Path:
    """The fp32 ONNX bundle of that checkpoint."""
    return build_once(tiny_checkpoint, workshop / "tiny-fp32", "fp32")


@pytest.fixture(scope="session")
def tiny_fp16_bundle(workshop: Path, tiny_checkpoint: Path) -> Path:
    """The fp16 ONNX bundle of that checkpoint."""
    return build_once(tiny_checkpoint, workshop / "tiny-fp16", "fp16")


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep tests out of the user's own store."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("SDRT_HOME", str(home))
    # What is not about backends shall not depend on those that are installed, nor compile for each size.
    monkeypatch.setenv("SDRT_RUN_BACKEND", "onnxruntime")
    return home


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)
