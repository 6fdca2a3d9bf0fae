"""Checkpoints with random weights, each written once a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from bench.checkpoints import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_folder_ema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a diffusers folder with averaged and plain U-Net weights."""
    return write_checkpoint(tmp_path_factory.mktemp("diffusers-ema") / "tiny", "diffusers", "tiny", ema=True)


@pytest.fixture(scope="session")
def tiny_ldm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an original checkpoint as .safetensors, with averaged weights."""
    return write_checkpoint(tmp_path_factory.mktemp("ldm") / "tiny.safetensors", "ldm", "tiny", ema=True)


@pytest.fixture(scope="session")
def tiny_ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an original checkpoint as PyTorch Lightning wrote it, without averaged weights."""
    return write_checkpoint(tmp_path_factory.mktemp("lightning") / "tiny.ckpt", "lightning", "tiny")
