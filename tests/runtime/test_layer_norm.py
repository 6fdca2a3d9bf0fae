"""Layer normalisation in C against numpy, alone and in graphs; skipped where not compiled, or a CPU has no AMX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.engines.bundle import Bundle
from sdrt.runtime import layer_norm
from sdrt.runtime.kernels import kernels

from .kernel_checks import (
    Guarded,
    bf16,
    fp32,
    guarded,
    kinds,
    model_of,
    needs_kernels,
    numbers,
    openvino,
    read,
    steps,
    tokens,
    with_ours,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

EPSILON = 1e-5
ops = openvino.opset13


def normalise(x: Array, scale: Array, shift: Array, threads: int = 2) -> Array:
    """Call the kernel."""
    found = kernels()
    assert found is not None
    x, result = guarded(x), Guarded(*x.shape)
    pointers = [array.ctypes.data for array in (x, scale, shift, result.array)]
    assert found.layer_norm(*pointers, *x.shape, EPSILON, threads) == 0
    return result.check()


def expected(x: Array, scale: Array, shift: Array) -> Array:
    """Do the same in float64."""
    exact = fp32(x).astype(np.float64)
    normal: Array = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + EPSILON)
    return normal * scale + shift


def check(x: Array) -> None:
    factors = numbers(8, x.shape[1]), numbers(9, x.shape[1])
    # A rounding to 8 bits.
    np.testing.assert_allclose(fp32(normalise(x, *factors)), expected(x, *factors), rtol=2**-8, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("channels", [16, 32, 48, 320, 1280])
@pytest.mark.parametrize("rows", [1, 2, 31, 1000])
def test_any_sizes(rows: int, channels: int) -> None:
    check(tokens(0, rows, channels, spread=3))


@needs_kernels
def test_a_mean_far_from_nought() -> None:
    # Squares of the numbers themselves would leave nothing of the variance in fp32.
    check(bf16(fp32(tokens(0, 100, 320, spread=64)) + 50000))


@needs_kernels
def test_all_the_same_and_far_apart() -> None:
    x = np.zeros((3, 64), np.uint16)
    x[1] = bf16(np.full(64, 3, np.float32))
    x[2, 5] = bf16(np.array([1e15], np.float32))[0]
    check(x)


@needs_kernels
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_not_hidden(bad: float) -> None:
    x = tokens(0, 100, 64)
    x[50, 3] = bf16(np.array([bad], np.float32))[0]
    found = np.isfinite(fp32(normalise(x, numbers(8, 64), numbers(9, 64))))
    assert not found[50].any()
    assert found.sum() == found.size - 64


@needs_kernels
def test_threads_change_nothing() -> None:
    x = tokens(0, 1000, 320)
    found = [normalise(x, numbers(8, 320), numbers(9, 320), threads) for threads in (1, 2, 3, 16)]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@needs_kernels
@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_fp16_bundle"])
def test_every_layer_norm_of_a_unet(bundle: str, request: pytest.FixtureRequest) -> None:
    model = read(Bundle.open(request.getfixturevalue(bundle)))
    blocks = kinds(model).count("Gelu")
    assert layer_norm.put_in(model) == 3 * blocks == 48
    model.validate_nodes_and_infer_types()
    assert kinds(model).count("SdrtLayerNorm") == 48


def norm(x: Any, *, axes: Any = (-1,), variance: bool = True, mode: str = "inside_sqrt", factors: Any = None) -> Any:
    shape = [list(x.output(0).shape)[-1]] if factors is None else factors
    normal = ops.mvn(x, np.array(axes), variance, EPSILON, mode)
    return ops.add(ops.multiply(normal, ops.constant(numbers(1, *shape))), ops.constant(numbers(2, *shape)))


@needs_kernels
@pytest.mark.parametrize("shape", [(3, 48), (2, 7, 64), (2, 3, 5, 32)])
@pytest.mark.parametrize("from_the_end", [True, False])
def test_graphs_with_it(shape: tuple[int, ...], from_the_end: bool) -> None:
    axes = (-1,) if from_the_end else (len(shape) - 1,)
    model, programs = with_ours(lambda x: norm(x, axes=axes), numbers(0, *shape, spread=5))
    assert steps(programs) == ["layer_norm"]
    assert not {"MVN", "Multiply", "Add"} & set(kinds(model))


@needs_kernels
@pytest.mark.parametrize(
    ("facts", "shape"),
    [
        ({"axes": (1,)}, (2, 7, 64)),
        ({"axes": (1, 2)}, (2, 7, 64)),
        ({"variance": False}, (2, 7, 64)),
        ({"mode": "outside_sqrt"}, (2, 7, 64)),
        ({"factors": [1]}, (2, 7, 64)),
        ({"factors": [32, 1]}, (2, 32, 32)),
        ({"factors": [3, 1, 64]}, (1, 7, 64)),
        ({}, (2, 7, 40)),
    ],
)
def test_what_is_no_such_layer_norm_is_left_alone(facts: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = model_of(lambda x: norm(x, **facts), shape)
    before = kinds(model)
    assert layer_norm.put_in(model) == 0
    assert kinds(model) == before


@needs_kernels
def test_what_is_normalised_and_used_otherwise_too_is_left_alone() -> None:
    def build(x: Any) -> Any:
        found = norm(x)
        normal = found.input_value(0).get_node().input_value(0)
        return [found, ops.relu(normal)]

    assert layer_norm.put_in(model_of(build, (2, 7, 64))) == 0
