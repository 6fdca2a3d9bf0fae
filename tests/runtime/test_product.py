"""Convolutions and products with weights in C against numpy; skipped where not compiled, or a CPU has no AMX."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from sdrt.runtime.kernels import kernels
from sdrt.runtime.product import DOUBLED, HALVED

from .kernel_checks import Guarded, bf16, error, fp32, guarded, needs_kernels, numbers, tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

ROUNDED = 0.003  # a relative L2 error: the result's numbers are rounded to 8 bits


def pack(weights: Array, *, side: int = 1, turned: bool = False, gates: Array | None = None) -> Array:
    """Pack weights [outputs, channels, side * side] as they lie in memory; `turned`, by channel first."""
    found = kernels()
    assert found is not None
    outputs, channels, taps = weights.shape
    assert taps == side**2
    parts = [weights] if gates is None else [weights, gates]
    packed = Guarded(len(parts) * weights.size)
    for index, part in enumerate(parts):
        if turned:
            lying, apart = np.ascontiguousarray(part.transpose(1, 2, 0)), (1, outputs * taps, outputs)
        else:
            lying, apart = np.ascontiguousarray(part), (channels * taps, taps, 1)
        to = packed.array.ctypes.data
        assert found.pack(lying.ctypes.data, to, channels, outputs, taps, *apart, index, len(parts), 2) == 0
    return packed.check()


class Sizes(NamedTuple):
    """Of the input, and how it is resized."""

    batch: int
    height: int
    width: int
    channels: int
    side: int = 1
    resize: int = 1

    @property
    def result(self) -> tuple[int, int, int]:
        batch, height, width = self[:3]
        if self.resize == DOUBLED:
            return batch, 2 * height, 2 * width
        return (batch, (height + 1) // 2, (width + 1) // 2) if self.resize == HALVED else (batch, height, width)


def multiply(
    x: Array,
    packed: Array,
    bias: Array,
    residual: Array | None,
    sizes: Sizes,
    *,
    gated: bool = False,
    threads: int = 2,
    off: int = 0,
) -> Array:
    """Call the kernel."""
    found = kernels()
    assert found is not None
    outputs = bias.shape[1]
    result = Guarded(*sizes.result, outputs // (1 + gated), off=off)
    x = guarded(x, off=off)
    residual = None if residual is None else guarded(residual, off=off)
    arrays = [None if array is None else array.ctypes.data for array in (x, packed, bias, residual, result.array)]
    *size, side, resize = sizes
    assert found.product(*arrays, *size, outputs, side, resize, len(bias), gated, threads) == 0
    return result.check()


def expected(x: Array, weights: Array, bias: Array, residual: Array | None, sizes: Sizes) -> Array:
    """Do the same in float64, with weights [outputs, channels, side * side]."""
    exact = fp32(x).astype(np.float64).reshape(*sizes[:4])
    if sizes.resize == DOUBLED:
        exact = exact.repeat(2, 1).repeat(2, 2)
    height, width = exact.shape[1:3]
    around = sizes.side // 2
    exact = np.pad(exact, ((0, 0), (around, around), (around, around), (0, 0)))
    step = 2 if sizes.resize == HALVED else 1
    result = np.zeros((*sizes.result, len(weights)))
    for tap in range(sizes.side**2):
        down, right = divmod(tap, sizes.side)
        part = exact[:, down : down + height : step, right : right + width : step]
        result += part @ fp32(bf16(weights[:, :, tap])).astype(np.float64).T
    result += bias[:, None, None]
    return result if residual is None else result + fp32(residual)


def check(sizes: Sizes, outputs: int, *, plain: bool = False, turned: bool = False, off: int = 0) -> None:
    """Compare with what there is a bias by batch and a residual, or, `plain`, one bias and no residual."""
    x = tokens(0, *sizes[:4])
    spread = (sizes.channels * sizes.side**2) ** -0.5
    weights = numbers(1, outputs, sizes.channels, sizes.side**2, spread=spread)
    weights += np.float32(1e-4) * np.sign(weights)  # to be rounded
    bias = numbers(2, 1 if plain else sizes.batch, outputs)
    residual = None if plain else tokens(3, *sizes.result, outputs)
    packed = pack(weights, side=sizes.side, turned=turned)
    found = multiply(x, packed, bias, residual, sizes, off=off)
    right = expected(x, weights, bias, residual, sizes)
    assert error(found, right) < ROUNDED
    # One number that is wrong among many is not seen in their norm.
    np.testing.assert_allclose(fp32(found), right, rtol=2**-8, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("channels", "outputs"), [(32, 32), (64, 96), (96, 64), (320, 32), (576, 64), (608, 160)])
@pytest.mark.parametrize("resize", [1, DOUBLED, HALVED])
@pytest.mark.parametrize("picture", [(1, 1, 1), (2, 1, 1), (1, 1, 7), (2, 5, 1), (3, 4, 9), (1, 17, 33), (2, 2, 40)])
def test_convolutions_of_any_sizes(
    picture: tuple[int, int, int], resize: int, channels: int, outputs: int, plain: bool
) -> None:
    check(Sizes(*picture, channels, 3, resize), outputs, plain=plain)


@needs_kernels
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("channels", "outputs"), [(32, 32), (64, 96), (320, 320), (1280, 64), (1312, 160), (2592, 32)])
@pytest.mark.parametrize("picture", [(1, 1, 1), (3, 1, 1), (1, 1, 15), (2, 1, 16), (3, 4, 9), (1, 1, 77), (2, 15, 23)])
def test_matrices_of_any_sizes(picture: tuple[int, int, int], channels: int, outputs: int, plain: bool) -> None:
    check(Sizes(*picture, channels), outputs, plain=plain)


@needs_kernels
@pytest.mark.parametrize(
    ("sizes", "outputs"),
    [
        (Sizes(2, 64, 64, 320, 3), 320),
        (Sizes(1, 32, 32, 1280, 3), 640),
        (Sizes(2, 8, 8, 1280, 3), 1280),
        (Sizes(2, 8, 8, 1280, 3, DOUBLED), 1280),
        (Sizes(2, 64, 64, 320, 3, HALVED), 320),
        (Sizes(1, 256, 256, 128, 3), 128),
        (Sizes(2, 64, 64, 320), 320),
        (Sizes(2, 16, 16, 5120), 1280),
        (Sizes(1, 96, 96, 960), 320),
    ],
)
def test_stable_diffusions_own_sizes(sizes: Sizes, outputs: int) -> None:
    check(sizes, outputs)


@needs_kernels
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("side", [1, 3])
def test_weights_lie_by_output_or_by_channel(side: int, turned: bool) -> None:
    """That is [outputs, channels, side, side], [outputs, channels] and [channels, outputs]."""
    check(Sizes(2, 5, 7, 96, side), 160, turned=turned)


@needs_kernels
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("off", [1, 16, 31])
def test_arrays_begin_anywhere(side: int, off: int) -> None:
    check(Sizes(3, 5, 7, 64, side), 96, off=off)


def gelu(x: Array) -> Array:
    distribution: Array = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x * distribution


class Gated(NamedTuple):
    """A product of values with the GELU of gates, and what it should be."""

    x: Array
    packed: Array
    bias: Array
    right: Array
    sizes: Sizes


def gated(rows: int, channels: int, outputs: int, *, turned: bool = False, gate: float = 0) -> Gated:
    sizes = Sizes(1, 1, rows, channels)
    x = tokens(0, *sizes[:4])
    values, gates = (numbers(seed, outputs, channels, 1, spread=channels**-0.5) for seed in (1, 2))
    biases = numbers(3, 1, outputs), numbers(4, 1, outputs) + np.float32(gate)
    left, right = (expected(x, each, bias, None, sizes) for each, bias in zip((values, gates), biases, strict=True))
    bias = np.stack([each.reshape(-1, 16) for each in biases], 1).reshape(1, -1)
    return Gated(x, pack(values, turned=turned, gates=gates), bias, left * gelu(right), sizes)


@needs_kernels
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("channels", "outputs"), [(32, 32), (64, 96), (320, 128), (1312, 160)])
@pytest.mark.parametrize("rows", [1, 16, 33, 150])
def test_values_and_gates_take_turns(rows: int, channels: int, outputs: int, turned: bool) -> None:
    given = gated(rows, channels, outputs, turned=turned)
    found = multiply(given.x, given.packed, given.bias, None, given.sizes, gated=True)
    assert error(found, given.right) < ROUNDED
    np.testing.assert_allclose(fp32(found), given.right, rtol=2**-8 + 2**-12, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("gate", [-1e30, -3e4, -30, -6, -3, 3, 30, 3e4, 1e30])
def test_gates_far_from_nought(gate: float) -> None:
    given = gated(64, 32, 64, gate=gate)
    found = multiply(given.x, given.packed, given.bias, None, given.sizes, gated=True)
    np.testing.assert_allclose(fp32(found), given.right, rtol=2**-8 + 2**-12, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("resize", [1, DOUBLED, HALVED])
def test_what_is_no_number_is_not_hidden_nor_spread(resize: int, bad: float) -> None:
    sizes = Sizes(2, 9, 11, 64, 3, resize)
    x, weights, bias = tokens(0, *sizes[:4]), numbers(1, 64, 64, 9), numbers(2, 1, 64)
    x[1, 4, 6, 3] = bf16(np.array([bad], np.float32))[0]
    with np.errstate(invalid="ignore"):
        right = np.isfinite(expected(x, weights, bias, None, sizes))
    assert 0 < (~right).sum() < right.size / 10
    found = multiply(x, pack(weights, side=3), bias, None, sizes)
    np.testing.assert_array_equal(np.isfinite(fp32(found)), right)


@needs_kernels
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_bias_and_residual_that_are_no_numbers(bad: float) -> None:
    sizes = Sizes(1, 5, 7, 64)
    x, weights, bias = tokens(0, *sizes[:4]), numbers(1, 64, 64, 1), numbers(2, 1, 64)
    residual = tokens(3, *sizes.result, 64)
    weights[5, 9, 0] = bias[0, 6] = bad
    residual[0, 3, 2, 7] = bf16(np.array([bad], np.float32))[0]
    found = np.isfinite(fp32(multiply(x, pack(weights), bias, residual, sizes)))
    assert not found[..., 5:7].any()
    assert not found[0, 3, 2, 7]
    assert found.sum() == found.size - 2 * 35 - 1


@needs_kernels
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_gates_that_are_no_numbers(bad: float) -> None:
    given = gated(40, 32, 64)
    given.bias[0, 16] = bad
    found = np.isfinite(fp32(multiply(given.x, given.packed, given.bias, None, given.sizes, gated=True)))
    assert not found[..., 0].any()
    assert found[..., 1:].all()


@needs_kernels
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(1, 40, 40, 320, 3),
        Sizes(2, 7, 5, 1280, 3),
        Sizes(2, 20, 20, 320, 3, DOUBLED),
        Sizes(1, 41, 40, 320, 3, HALVED),
        Sizes(2, 40, 41, 320),
        Sizes(2, 1, 77, 2560),
    ],
)
def test_threads_change_nothing(sizes: Sizes) -> None:
    x, bias, residual = tokens(0, *sizes[:4]), numbers(2, sizes.batch, 320), tokens(3, *sizes.result, 320)
    packed = pack(numbers(1, 320, sizes.channels, sizes.side**2), side=sizes.side)
    found = [multiply(x, packed, bias, residual, sizes, threads=count) for count in (1, 2, 3, 16)]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@needs_kernels
def test_threads_change_nothing_of_what_is_gated() -> None:
    given = gated(600, 320, 320)
    found = [
        multiply(given.x, given.packed, given.bias, None, given.sizes, gated=True, threads=count)
        for count in (1, 2, 3, 16)
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
