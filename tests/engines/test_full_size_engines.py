"""Engines of the real size, built without a GPU: minutes and gigabytes, run by `make test-full`."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from bench.checkpoints import write_checkpoint
from bench.full_size import measured

from sdrt.engines.bundle import Bundle
from sdrt.engines.fusion_table import reports_of

if TYPE_CHECKING:
    from pathlib import Path

    from sdrt.engines.fusion import PatternKind

ALL_FUSED: dict[str, dict[PatternKind, int]] = {
    "text_encoder": {"attention": 12, "layer_norm": 25},
    "unet": {"attention": 32, "geglu": 16, "group_norm": 61, "silu": 47},
    "vae_decoder": {"group_norm": 30, "silu": 29},
    "vae_encoder": {"group_norm": 22, "silu": 21},
}
"""How many of each there are in Stable Diffusion v1. The VAE's attention, which has one head, is not fused."""


@pytest.mark.full_size
@pytest.mark.timeout(3600)
def test_engines_of_the_full_size_are_fused_and_built_within_memory(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "full", "diffusers", "full", dtype="float16")
    # Both in processes of their own, which tell their own peaks.
    measured(
        "build", "--ckpt", str(checkpoint), "--backend", "onnx", "--precision", "fp16", "-o", str(tmp_path / "onnx")
    )
    shutil.rmtree(checkpoint)
    target = ("--backend", "tensorrt-rtx", "--target", "rtx3090")
    figures = measured("build", "--from", str(tmp_path / "onnx"), *target, "-o", str(tmp_path / "engines"))
    assert figures["peak_gb"] <= 8
    bundle = Bundle.open(tmp_path / "engines")
    assert bundle.manifest.backend.compute_capabilities == ("8.6",)
    reports = reports_of(bundle)
    # With guidance and without.
    assert reports["unet"].profiles == (0, 1)
    found = {
        (name, profile): {kind: reports[name].count(kind, profile) for kind in kinds}
        for name, kinds in ALL_FUSED.items()
        for profile in reports[name].profiles
    }
    assert found == {
        (name, profile): {kind: (count, count) for kind, count in ALL_FUSED[name].items()} for name, profile in found
    }
