"""Quantisers on a graph that is small enough to be computed by hand, and the search for layers that do without."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdrt.engines.deviation import deviation
from sdrt.engines.quantizers import groups, make_unsigned, store_weights, weighted_layers, without
from sdrt.engines.sensitivity import Search

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

RNG = np.random.default_rng(0)
WEIGHTS = {
    "kernel": RNG.standard_normal((8, 4, 3, 3), np.float32),
    "first": RNG.standard_normal((16, 8), np.float32),
    "second": RNG.standard_normal((16, 8), np.float32),
}
X = RNG.uniform(-1, 3, (2, 4, 6, 6)).astype(np.float32)


def pair(of: str, axis: int | None = None) -> list[onnx.NodeProto]:
    """Nodes that quantise a tensor and turn it back, with the constants `of.scale` and `of.zero`."""
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    given = [f"{of}.scale", f"{of}.zero"]
    return [
        helper.make_node("QuantizeLinear", [of, *given], [f"{of}.q"], f"{of}.Q", **attributes),
        helper.make_node("DequantizeLinear", [f"{of}.q", *given], [f"{of}.dq"], f"{of}.DQ", **attributes),
    ]


def quantized_graph(folder: Path) -> onnx.ModelProto:
    """A convolution, then two products that read its rectified output, and a product of their outputs."""
    nodes = [
        *pair("x"),
        *pair("kernel", axis=0),
        helper.make_node("Conv", ["x.dq", "kernel.dq"], ["seen"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["seen"], ["positive"], "relu"),
        helper.make_node("GlobalMaxPool", ["positive"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["rows"], "flatten"),
        *pair("rows"),
        *pair("first", axis=0),
        *pair("second", axis=-2),
        helper.make_node("Gemm", ["rows.dq", "first.dq"], ["a"], "gemm", transB=1),
        helper.make_node("Gemm", ["rows.dq", "second.dq"], ["b"], "gemm_too", transB=1),
        helper.make_node("Transpose", ["b"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["a", "turned"], ["y"], "scores"),
    ]
    constants = []
    for name, weights in WEIGHTS.items():
        constants.append(numpy_helper.from_array(weights, name))
        scale = np.abs(weights).max(axis=tuple(range(1, weights.ndim))) / 127
        constants += [
            numpy_helper.from_array(scale, f"{name}.scale"),
            numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{name}.zero"),
        ]
    for name, (low, high) in {"x": (-1, 3), "rows": (0, 40)}.items():
        scale = np.float32((high - low) / 255)
        constants += [
            numpy_helper.from_array(np.array(scale), f"{name}.scale"),
            numpy_helper.from_array(np.array(round(-low / scale) - 128, np.int8), f"{name}.zero"),
        ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 2))],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "it.onnx", save_as_external_data=True, location="it.data", size_threshold=256)
    return onnx.load(folder / "it.onnx", load_external_data=False)


def run(model: onnx.ModelProto, folder: Path) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


def expected() -> NDArray[np.float32]:
    """What the graph computes without quantisers."""
    padded = np.pad(X, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    rows = np.maximum(np.einsum("bchwij,ocij->bohw", patches, WEIGHTS["kernel"]), 0).max(axis=(2, 3))
    return np.asarray((rows @ WEIGHTS["first"].T) @ (rows @ WEIGHTS["second"].T).T)


def relative(found: NDArray[np.float32]) -> float:
    return deviation(found, expected())[1]


def test_layers_that_read_one_tensor_share_its_quantiser(tmp_path: Path) -> None:
    graph = quantized_graph(tmp_path).graph
    assert list(weighted_layers(graph)) == ["conv", "gemm", "gemm_too"]
    assert [(group.layers, group.values) for group in groups(graph)] == [
        (("conv",), frozenset({"x.dq", "kernel.dq"})),
        (("gemm", "gemm_too"), frozenset({"rows.dq", "first.dq", "second.dq"})),
    ]


def test_layers_without_quantisers_compute_as_they_did(tmp_path: Path) -> None:
    model = quantized_graph(tmp_path)
    before = model.SerializeToString()
    conv, products = groups(model.graph)
    plain = without(model, [conv, products])
    assert {node.op_type for node in plain.graph.node} & {"QuantizeLinear", "DequantizeLinear"} == set()
    assert {tensor.name for tensor in plain.graph.initializer} == set(WEIGHTS)
    assert relative(run(plain, tmp_path)) < 1e-6
    errors = [relative(run(without(model, alone), tmp_path)) for alone in ([], [conv], [products])]
    assert all(1e-4 < error < 3e-2 for error in errors)
    assert len(set(errors)) == 3
    assert groups(without(model, [conv]).graph) == (products,)
    assert model.SerializeToString() == before


def test_unsigned_activations_change_nothing(tmp_path: Path) -> None:
    model = quantized_graph(tmp_path)
    before = run(model, tmp_path)
    make_unsigned(model.graph)
    constants = {tensor.name: numpy_helper.to_array(tensor, str(tmp_path)) for tensor in model.graph.initializer}
    assert constants["x.zero"].dtype == np.uint8
    assert constants["x.zero"].item() == 64
    assert constants["kernel.zero"].dtype == np.int8
    np.testing.assert_allclose(run(model, tmp_path), before, rtol=1e-6)


def test_weights_are_stored_as_the_integers_that_the_graph_would_make_of_them(tmp_path: Path) -> None:
    model = quantized_graph(tmp_path)
    conv, products = groups(model.graph)
    # One layer alone keeps its weights as they are.
    kept = without(model, [conv])
    before = run(kept, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    store_weights(kept, tmp_path, other / "new.data")
    onnx.save(kept, other / "new.onnx")
    onnx.checker.check_model(other / "new.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor, str(other)) for tensor in kept.graph.initializer}
    assert {name: array.dtype for name, array in stored.items() if name.startswith("first")} == {
        "first.q": np.int8,
        "first.scale": np.float32,
        "first.zero": np.int8,
    }
    assert np.array_equal(stored["kernel"], WEIGHTS["kernel"])
    scale = np.abs(WEIGHTS["second"]).max(axis=1, keepdims=True) / 127
    assert np.array_equal(stored["second.q"], np.rint(WEIGHTS["second"] / scale))
    assert [node.name for node in kept.graph.node if node.op_type == "QuantizeLinear"] == ["rows.Q"]
    np.testing.assert_allclose(run(kept, other), before, rtol=1e-6)
    assert products.layers == ("gemm", "gemm_too")


class Scales:
    """Parts that add a known error each, their squares adding up, and how often they were asked."""

    def __init__(self, errors: Sequence[float]) -> None:
        self.errors = errors
        self.asked = 0

    def __call__(self, parts: Sequence[int]) -> float:
        self.asked += 1
        return math.sqrt(sum(self.errors[part] ** 2 for part in parts))


def test_the_few_that_do_harm_are_found_by_few_measurements() -> None:
    scales = Scales([{3: 0.05, 117: 0.05, 199: 0.02}.get(part, 0.001) for part in range(200)])
    search = Search(range(200), scales)
    search.run(1.0)
    assert (search.left_alone, scales.asked) == ([], 1)
    search.run(0.03)
    assert set(search.left_alone) == {3, 117}
    assert scales.asked < 40
    search.run(0.018)
    assert search.left_alone[-1] == 199
    assert len(search.left_alone) == 3


def test_a_bound_of_nothing_leaves_all_alone() -> None:
    search = Search([5, 6, 7], lambda parts: float(len(parts)))
    search.run(0.0)
    assert sorted(search.left_alone) == [5, 6, 7]


def test_deviation() -> None:
    """A relative error of one half, and a peak of 2 over a mean square of one half."""
    reference = np.array([0.0, 2.0], np.float32)
    assert deviation(np.array([0.0, 1.0]), reference) == pytest.approx((1.0, 0.5, 10 * math.log10(8)))
    assert deviation(reference, reference) == (0.0, 0.0, math.inf)
    assert all(math.isnan(figure) for figure in deviation(np.array([0.0, math.nan]), reference))
