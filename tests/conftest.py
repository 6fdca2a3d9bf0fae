"""What many tests share: one small checkpoint and the bundles built of it, each made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.checkpoints import write_checkpoint
from sdrt.engines.bundle import Bundle


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="session")
def tiny_checkpoint(session_folder: Path) -> Path:
    """A diffusers folder of Stable Diffusion v1's architecture, small, with random weights."""
    return write_checkpoint(session_folder / "tiny", "diffusers", "tiny", seed=0)


@pytest.fixture(scope="session")
def tiny_bundle(session_folder: Path, tiny_checkpoint: Path) -> Path:
    """The fp32 ONNX bundle of that checkpoint."""
    from sdrt.export.build import build

    (session_folder / "bundles").mkdir(exist_ok=True)
    return build(str(tiny_checkpoint), output=session_folder / "bundles" / "tiny", precision="fp32").folder


@pytest.fixture(scope="session")
def tiny_fp16_bundle(session_folder: Path, tiny_checkpoint: Path) -> Path:
    """The fp16 ONNX bundle of that checkpoint."""
    from sdrt.export.build import build

    (session_folder / "bundles").mkdir(exist_ok=True)
    return build(str(tiny_checkpoint), output=session_folder / "bundles" / "tiny-fp16", precision="fp16").folder


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep tests out of the user's own store."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("SDRT_HOME", str(home))
    return home


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)
