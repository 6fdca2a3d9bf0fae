"""Which convolutions and products of OpenVINO's graphs become our own, and that they compute the same then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.engines.bundle import Bundle
from sdrt.runtime import product

from .kernel_checks import kinds, model_of, needs_kernels, numbers, openvino, read, steps, with_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Build = Callable[..., Any]

ops = openvino.opset13
PICTURE, TOKENS = (2, 32, 6, 10), (2, 20, 64)


def constant(seed: int, *shape: int, spread: float = 1.0) -> Any:
    return ops.constant(numbers(seed, *shape, spread=spread))


def shape_of(x: Any) -> list[int]:
    """Give the shape of a node with one output, or of an output."""
    return list((x.output(0) if hasattr(x, "output") else x).shape)


def convolution(
    x: Any,
    outputs: int = 64,
    side: int = 3,
    *,
    strides: Sequence[int] = (1, 1),
    begin: Sequence[int] | None = None,
    end: Sequence[int] | None = None,
    dilations: Sequence[int] = (1, 1),
) -> Any:
    channels = shape_of(x)[1]
    weights = constant(1, outputs, channels, side, side, spread=(channels * side**2) ** -0.5)
    around = [side // 2] * 2
    begin = list(around if begin is None else begin)
    return ops.convolution(x, weights, list(strides), begin, list(around if end is None else end), list(dilations))


def matrix(x: Any, outputs: int = 96, *, seed: int = 1, turned: bool = False, transposed: bool = False) -> Any:
    channels = shape_of(x)[-2 if transposed else -1]
    shape = (outputs, channels) if turned else (channels, outputs)
    return ops.matmul(x, constant(seed, *shape, spread=channels**-0.5), transposed, turned)


def doubled(x: Any, *, by: int = 2, **other: str) -> Any:
    sizes = np.array([by * size for size in shape_of(x)[2:]])
    facts = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"} | other
    return ops.interpolate(x, sizes, shape_calculation_mode="sizes", axes=np.array([2, 3]), **facts)


def gated(x: Any, *, mode: str = "ERF", swapped: bool = False, gates_of: Any = None) -> Any:
    values = ops.add(matrix(x, seed=1), constant(2, 96))
    gates = ops.gelu(ops.add(matrix(x if gates_of is None else gates_of, seed=3), constant(4, 96)), mode)
    return ops.multiply(gates, values) if swapped else ops.multiply(values, gates)


def embedded(x: Any, embedding: Any) -> Any:
    """Add what is computed from a timestep, as a residual block does."""
    flat = ops.add(matrix(embedding, 64), constant(5, 64))
    shaped = ops.unsqueeze(ops.unsqueeze(flat, np.array(2)), np.array(3))
    return ops.add(ops.add(convolution(x), constant(2, 1, 64, 1, 1)), shaped)


def check(
    build: Build, shapes: Sequence[Sequence[int]], products: int, *, left: Sequence[str] = (), gone: Sequence[str] = ()
) -> None:
    """Tell what a graph is to have of our products, what it has still, and what they took in."""
    arrays = [numbers(index, *shape) for index, shape in enumerate(shapes)]
    model = model_of(build, *shapes)
    assert product.put_in(model) == products
    model, programs = with_ours(build, *arrays)
    assert steps(programs).count("product") == products
    found = kinds(model)
    for kind in left:
        assert kind in found
    for kind in gone:
        assert kind not in found


@needs_kernels
@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_fp16_bundle"])
def test_products_of_a_unet(bundle: str, request: pytest.FixtureRequest) -> None:
    """All but the first convolution and the last, of 4 channels, and what has too few rows."""
    model = read(Bundle.open(request.getfixturevalue(bundle)))
    nodes = model.get_ordered_ops()

    def weighted(node: Any) -> bool:
        source = node.input_value(1).get_node()
        while source.get_type_name() == "Convert":
            source = source.input_value(0).get_node()
        return bool(source.get_type_name() == "Constant")

    matrices = [node for node in nodes if node.get_type_name() == "MatMul" and weighted(node)]
    rows = [int(np.prod(list(node.get_input_shape(0))[:-1])) for node in matrices]
    # Where there are fewer rows, values and gates are two products less, for they would have been one.
    few = sum(count < 16 for count in rows)
    gates = [node for node in nodes if node.get_type_name() == "Gelu"]

    def gated(node: Any) -> bool:
        # In fp16 both are halves of one product, as TensorRT wants it.
        halves = node.input_value(0).get_node().get_type_name() == "Split"
        return not halves and int(np.prod(list(node.get_output_shape(0))[:-1])) >= 16

    many = sum(map(gated, gates))
    convolutions = kinds(model).count("Convolution") - 2
    count = product.put_in(model)
    model.validate_nodes_and_infer_types()
    assert count == kinds(model).count("SdrtProduct") == convolutions + len(matrices) - few - many > 200
    assert kinds(model).count("Convolution") == 2
    assert kinds(model).count("Gelu") == len(gates) - many
    assert kinds(model).count("Interpolate") == 1, "from 1x2 to 2x3"


@needs_kernels
@pytest.mark.parametrize(
    ("build", "shape", "gone"),
    [
        (convolution, PICTURE, ["Convolution"]),
        (lambda x: convolution(x, side=1), PICTURE, ["Convolution"]),
        (lambda x: convolution(x, strides=(2, 2)), PICTURE, ["Convolution"]),
        (lambda x: convolution(x, strides=(2, 2)), (1, 32, 7, 1), ["Convolution"]),
        (lambda x: convolution(doubled(x)), PICTURE, ["Convolution", "Interpolate"]),
        (lambda x: convolution(doubled(x), side=1), PICTURE, ["Convolution"]),
        (lambda x: ops.add(convolution(x), constant(2, 1, 64, 1, 1)), PICTURE, ["Add"]),
        (lambda x: ops.add(constant(2, 64, 1, 1), convolution(x)), PICTURE, ["Add"]),
        (lambda x: ops.add(ops.add(convolution(x, 32), constant(2, 1, 32, 1, 1)), x), PICTURE, ["Add"]),
        (lambda x: ops.add(x, convolution(x, 32)), PICTURE, ["Add"]),
        (lambda x: ops.add(convolution(x), convolution(x, side=1)), PICTURE, ["Add"]),
        (matrix, TOKENS, ["MatMul"]),
        (matrix, (20, 64), ["MatMul"]),
        (lambda x: matrix(x, turned=True), TOKENS, ["MatMul"]),
        (lambda x: ops.add(matrix(x), constant(2, 96)), TOKENS, ["Add"]),
        (lambda x: ops.add(x, ops.add(constant(2, 64), matrix(x, 64))), TOKENS, ["Add"]),
    ],
)
def test_what_is_done_to_products_is_taken_in(build: Build, shape: tuple[int, ...], gone: list[str]) -> None:
    nodes = kinds(model_of(build, shape))
    check(build, [shape], nodes.count("Convolution") + nodes.count("MatMul"), gone=gone)


@needs_kernels
@pytest.mark.parametrize("swapped", [False, True])
def test_values_and_gates_become_one(swapped: bool) -> None:
    check(lambda x: gated(x, swapped=swapped), [TOKENS], 1, gone=["Gelu", "MatMul", "Add", "Multiply"])


@needs_kernels
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_added_by_channel_and_batch_is_a_bias(batch: int) -> None:
    """Computed from a timestep, of which there is one for all pictures or one for each."""
    check(embedded, [PICTURE, (batch, 32)], 1, left=["MatMul"])
    model = model_of(embedded, PICTURE, (batch, 32))
    product.put_in(model)
    # Of four numbers for each channel, and none for each pixel.
    sizes = [node.get_output_shape(0) for node in model.get_ordered_ops() if node.get_type_name() == "Add"]
    assert all(len(size) == 2 for size in sizes)


@needs_kernels
@pytest.mark.parametrize(
    ("build", "shape", "left"),
    [
        (lambda x: matrix(x, transposed=True), (64, 32), "MatMul"),
        (matrix, (2, 7, 64), "MatMul"),
        (matrix, (1, 2, 20, 64), "MatMul"),
        (matrix, (2, 20, 48), "MatMul"),
        (lambda x: matrix(x, 80), TOKENS, "MatMul"),
        (lambda x: ops.matmul(x, x, False, True), TOKENS, "MatMul"),
        (lambda x: ops.matmul(x, constant(1, 2, 64, 96), False, False), TOKENS, "MatMul"),
        (lambda x: convolution(x, dilations=(2, 2)), PICTURE, "Convolution"),
        (lambda x: convolution(x, begin=(0, 0)), PICTURE, "Convolution"),
        (lambda x: convolution(x, end=(0, 0)), PICTURE, "Convolution"),
        (lambda x: convolution(x, begin=(2, 2), end=(2, 2)), PICTURE, "Convolution"),
        (lambda x: convolution(x, side=1, begin=(1, 1), end=(1, 1)), PICTURE, "Convolution"),
        (lambda x: convolution(x, strides=(1, 2)), PICTURE, "Convolution"),
        (lambda x: convolution(x, side=1, strides=(2, 2)), PICTURE, "Convolution"),
        (lambda x: convolution(x, side=5), PICTURE, "Convolution"),
        (lambda x: convolution(x, 48), PICTURE, "Convolution"),
        (convolution, (1, 48, 6, 10), "Convolution"),
        (convolution, (1, 4, 6, 10), "Convolution"),
        (
            lambda x: ops.group_convolution(x, constant(1, 2, 32, 16, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1]),
            PICTURE,
            "GroupConvolution",
        ),
    ],
)
def test_what_is_no_such_product_is_left_alone(build: Build, shape: tuple[int, ...], left: str) -> None:
    check(build, [shape], 0, left=[left])


@needs_kernels
@pytest.mark.parametrize("other", [{"by": 3}, {"mode": "linear"}, {"coordinate_transformation_mode": "align_corners"}])
def test_pictures_that_are_resized_otherwise(other: dict[str, Any]) -> None:
    check(lambda x: convolution(doubled(x, **other)), [PICTURE], 1, left=["Interpolate"])


@needs_kernels
def test_an_approximate_gelu_is_left() -> None:
    check(lambda x: gated(x, mode="TANH"), [TOKENS], 2, left=["Gelu", "Multiply"])


@needs_kernels
def test_gates_of_something_else_are_left() -> None:
    check(lambda x, other: gated(x, gates_of=other), [TOKENS, TOKENS], 2, left=["Gelu"])


@needs_kernels
def test_gates_of_another_output_of_the_same_are_left() -> None:
    def build(x: Any) -> Any:
        parts = ops.split(x, np.array(2), 2)
        return gated(parts.output(0), gates_of=parts.output(1))

    check(build, [(2, 20, 64)], 2, left=["Gelu"])


@needs_kernels
def test_a_bias_that_is_computed_is_added_afterwards() -> None:
    check(lambda x, bias: ops.add(matrix(x), bias), [TOKENS, (96,)], 1, left=["Add"])
    check(lambda x, bias: ops.add(convolution(x), bias), [PICTURE, (2, 1, 6, 10)], 1, left=["Add"])


@needs_kernels
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda x: ops.add(matrix(x, 32), constant(2, 32, 1)), (1, 32, 64)),
        (lambda x: ops.add(convolution(x, 32), constant(2, 32)), (1, 32, 5, 32)),
        (lambda x: ops.add(convolution(x, 32), constant(2, 32, 1)), (1, 32, 32, 5)),
    ],
)
def test_what_is_added_along_another_axis_is_no_bias(build: Build, shape: tuple[int, ...]) -> None:
    """Though it has as many numbers as there are outputs."""
    check(build, [shape], 1, left=["Add"])


@needs_kernels
@pytest.mark.parametrize(
    "build",
    [
        lambda x: ops.add(matrix(x), constant(2, 1, 1, 96)),
        lambda x: ops.add(matrix(x), constant(2, 3, 20, 96)),
        lambda x: ops.add(matrix(x), constant(2, 1, 20, 96)),
    ],
)
def test_what_is_added_may_make_it_larger(build: Build) -> None:
    check(build, [(20, 64)], 1, left=["Add"])


@needs_kernels
def test_a_result_that_is_used_before_something_is_added_to_it() -> None:
    def build(x: Any) -> Any:
        result = convolution(x, 32)
        return [ops.add(result, x), ops.relu(result), ops.add(result, result)]

    check(build, [PICTURE], 1, left=["Add"])
