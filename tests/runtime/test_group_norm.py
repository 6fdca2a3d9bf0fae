"""Group normalisation in C against numpy, alone and in graphs; skipped where not compiled, or a CPU has no AMX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.engines.bundle import Bundle
from sdrt.runtime import group_norm
from sdrt.runtime.kernels import kernels

from .kernel_checks import NOT_WRITTEN, bf16, fp32, kinds, needs_kernels, openvino, read, tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    Array = NDArray[Any]

EPSILON = 1e-5


def normalise(x: Array, scale: Array, shift: Array, groups: int, *, silu: bool, threads: int = 2) -> Array:
    """Call the kernel."""
    found = kernels()
    assert found is not None
    result = np.full(x.shape, NOT_WRITTEN, np.uint16)
    pointers = [array.ctypes.data for array in (x, scale, shift, result)]
    assert found.group_norm(*pointers, *x.shape, groups, EPSILON, silu, threads) == 0
    assert (result != NOT_WRITTEN).all()
    return result


def expected(x: Array, scale: Array, shift: Array, groups: int, *, silu: bool) -> Array:
    """Do the same in float64."""
    rows, pixels, channels = x.shape
    grouped = fp32(x).astype(np.float64).reshape(rows, pixels, groups, channels // groups)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    z: Array = ((grouped - mean) / np.sqrt(variance + EPSILON)).reshape(x.shape) * scale + shift
    with np.errstate(over="ignore"):
        return z / (1 + np.exp(-z)) if silu else z


def factors(channels: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(9)
    return rng.standard_normal(channels, np.float32), rng.standard_normal(channels, np.float32)


def check(found: Array, right: Array) -> None:
    # A rounding to 8 bits, and what the reciprocal is off by.
    np.testing.assert_allclose(fp32(found), right, rtol=2**-8 + 2**-12, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("channels", "groups"), [(16, 1), (32, 32), (64, 32), (80, 16), (320, 32), (1920, 32)])
@pytest.mark.parametrize(("rows", "pixels"), [(1, 1), (2, 31), (3, 97), (2, 1024)])
def test_any_sizes(rows: int, pixels: int, channels: int, groups: int, silu: bool) -> None:
    x = tokens(0, rows, pixels, channels, spread=3)
    x[:, :, : channels // groups] = bf16(fp32(x[:, :, : channels // groups]) + 7)
    check(normalise(x, *factors(channels), groups, silu=silu), expected(x, *factors(channels), groups, silu=silu))


@needs_kernels
def test_a_mean_far_from_nought() -> None:
    # Squares of the numbers themselves would leave nothing of the variance in fp32.
    x = bf16(fp32(tokens(0, 1, 4096, 64, spread=64)) + 50000)
    check(normalise(x, *factors(64), 2, silu=False), expected(x, *factors(64), 2, silu=False))


@needs_kernels
def test_a_picture_of_the_decoder() -> None:
    x = tokens(0, 1, 512 * 512, 128)
    check(normalise(x, *factors(128), 32, silu=True), expected(x, *factors(128), 32, silu=True))


@needs_kernels
def test_all_the_same_and_far_apart() -> None:
    x = np.zeros((1, 64, 64), np.uint16)
    scale, shift = factors(64)
    check(normalise(x, scale, shift, 32, silu=False), np.broadcast_to(shift, x.shape))
    x[0, 0] = bf16(np.full(64, 1e15, np.float32))
    large = np.float32(1e3) * scale
    check(normalise(x, large, shift, 32, silu=True), expected(x, large, shift, 32, silu=True))


@needs_kernels
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_not_hidden(bad: float) -> None:
    x = tokens(0, 2, 100, 64)
    x[1, 50, 3] = bf16(np.array([bad], np.float32))[0]
    found = fp32(normalise(x, *factors(64), 16, silu=True))
    assert np.isnan(found[1, :, :4]).all()
    assert np.isfinite(found[0]).all()
    assert np.isfinite(found[1, :, 4:]).all()


@needs_kernels
def test_threads_change_next_to_nothing() -> None:
    x = tokens(0, 2, 4096, 320)
    found = [fp32(normalise(x, *factors(320), 32, silu=True, threads=count)) for count in (1, 2, 3, 16)]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=2**-7, atol=1e-6)
    again = fp32(normalise(x, *factors(320), 32, silu=True, threads=2))
    np.testing.assert_array_equal(again, found[1])


@needs_kernels
@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_fp16_bundle"])
def test_every_group_norm_of_a_unet(bundle: str, request: pytest.FixtureRequest) -> None:
    model = read(Bundle.open(request.getfixturevalue(bundle)))
    # Others are of tokens, which OpenVINO normalises as they lie.
    norms = [node for node in model.get_ordered_ops() if node.get_type_name() == "MVN"]
    gates = kinds(model).count("Sigmoid")
    found = group_norm.put_in(model)
    model.validate_nodes_and_infer_types()
    assert (
        found == kinds(model).count("SdrtGroupNorm") == sum(len(node.get_output_shape(0)) == 3 for node in norms) - 48
    )
    # The timestep's are left.
    assert kinds(model).count("Sigmoid") < gates / 4


def first_norm(model: Any) -> Any:
    return next(node for node in model.get_ordered_ops() if node.get_type_name() == "MVN")


def consumer(node: Any) -> Any:
    (target,) = node.output(0).get_target_inputs()
    return target.get_node()


def scaled_inside(mvn: Any) -> None:
    two = openvino.opset13.constant(np.full((1, 32, 1), 2, np.float32))
    consumer(mvn).input(1).replace_source_output(two.output(0))


def one_number_for_all_channels(mvn: Any) -> None:
    multiplied = consumer(consumer(consumer(consumer(mvn))))
    multiplied.input(1).replace_source_output(openvino.opset13.constant(np.float32(2)).output(0))


@needs_kernels
@pytest.mark.parametrize("change", [scaled_inside, one_number_for_all_channels])
def test_what_is_no_such_group_norm_is_left_alone(change: Callable[[Any], None], tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    whole = group_norm.put_in(read(bundle))
    model = read(bundle)
    change(first_norm(model))
    model.validate_nodes_and_infer_types()
    assert group_norm.put_in(model) == whole - 1
