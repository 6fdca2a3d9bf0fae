"""Attention merged for onnxruntime: every one found, nothing else touched, the same results."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest

from sdrt.engines.attention import merge_attention

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

INPUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "unet": {"latents": (2, 4, 16, 12), "timestep": (1,), "text_embeddings": (2, 77, 64)},
    "vae_decoder": {"latents": (1, 4, 16, 12)},
    "vae_encoder": {"image": (1, 3, 64, 48)},
}


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def run(graph: Path, inputs: dict[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, inputs)]


def inputs_of(graph: Path, component: str) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    width = {each.name: each.shape[-1] for each in session.get_inputs()}
    shapes: dict[str, tuple[int, ...]] = {**INPUTS[component]}
    if component == "unet":
        shapes["text_embeddings"] = (2, 77, width["text_embeddings"])
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("component", INPUTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_attention_is_merged_and_computes_the_same(
    request: pytest.FixtureRequest, tmp_path: Path, component: str, precision: str
) -> None:
    bundle: Path = request.getfixturevalue("tiny_bundle" if precision == "fp32" else "tiny_fp16_bundle")
    graph = bundle / f"{component}.onnx"
    model = onnx.load(graph, load_external_data=False)
    attentions = kinds(model)["Softmax"]
    assert merge_attention(model) == attentions > 0
    after = kinds(model)
    assert after["MultiHeadAttention"] == attentions
    assert after["Softmax"] == 0
    assert merge_attention(model) == 0, "once is enough"
    shutil.copy(bundle / f"{component}.onnx.data", tmp_path)
    onnx.save(model, tmp_path / "merged.onnx")
    inputs = inputs_of(graph, component)
    for merged, plain in zip(run(tmp_path / "merged.onnx", inputs), run(graph, inputs), strict=True):
        error = np.linalg.norm(merged - plain) / np.linalg.norm(plain)
        assert error < (1e-4 if precision == "fp32" else 2e-2)


def test_attention_with_a_mask_is_left_alone(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "text_encoder.onnx", load_external_data=False)
    before = model.SerializeToString()
    assert merge_attention(model) == 0
    assert model.SerializeToString() == before
