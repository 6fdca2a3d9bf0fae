"""The edits of bench/fusion.py: what is compared there must be the same network."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from bench.fusion import Trial, edit, measure, table

from sdrt.engines.bundle import Bundle

if TYPE_CHECKING:
    from pathlib import Path

    from bench.fusion import Graph


def decode(graph: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    return np.asarray(session.run(None, {"latents": latents})[0])


@pytest.mark.parametrize(
    ("change", "fewer_casts"), [("GroupNorm and SiLU in float16", 60), ("SiLU in float16", 0), ("as exported", 0)]
)
def test_an_edited_graph_computes_the_same(
    tiny_fp16_bundle: Path, tmp_path: Path, change: Graph, fewer_casts: int
) -> None:
    source = Bundle.open(tiny_fp16_bundle).path(Bundle.open(tiny_fp16_bundle).component("vae_decoder").graph)
    edited = tmp_path / source.name
    edit(source, change, edited)
    shutil.copy(f"{source}.data", tmp_path)
    casts, ops = (
        Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
        for path in (source, edited)
    )
    assert casts["Cast"] - ops["Cast"] == fewer_casts
    assert casts["InstanceNormalization"] == ops["InstanceNormalization"] == 30
    expected, found = decode(source), decode(edited)
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_what_would_change_nothing_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing that 'SiLU in float16' would change"):
        edit(tiny_bundle / "vae_decoder.onnx", "SiLU in float16", tmp_path / "vae_decoder.onnx")


def test_a_trial_is_measured_and_laid_out(tiny_fp16_bundle: Path) -> None:
    row = measure(tiny_fp16_bundle, Trial("vae_decoder", "SiLU in float16", level=1), (64, 64), "rtx3090")
    assert row["layers"] > row["copies"] > 0
    assert row["fused"]["group_norm"].endswith("of 30")
    assert "vae_decoder  SiLU in float16  fixed   1 " in table([row])
