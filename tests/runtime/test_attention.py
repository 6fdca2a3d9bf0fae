"""Attention in C against numpy, alone and in graphs; skipped where it is not compiled or the CPU has no AMX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.engines.bundle import Bundle
from sdrt.runtime import attention
from sdrt.runtime.kernels import kernels

from .kernel_checks import NOT_WRITTEN, bf16, error, fp32, kinds, needs_kernels, openvino, read, tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    Array = NDArray[Any]


def attend(q: Array, k: Array, v: Array, heads: int, scale: float, threads: int = 2) -> Array:
    """Call the kernel with arrays of bf16."""
    found = kernels()
    assert found is not None
    batch, queries, width = q.shape
    result = np.full(q.shape, NOT_WRITTEN, np.uint16)
    pointers = [array.ctypes.data for array in (q, k, v, result)]
    assert found.attention(*pointers, batch, queries, k.shape[1], heads, width // heads, scale, threads) == 0
    assert (result != NOT_WRITTEN).all()
    return result


def expected(q: Array, k: Array, v: Array, heads: int, scale: float) -> Array:
    """Do the same in float64."""

    def split(array: Array) -> Array:
        batch, length, width = array.shape
        return fp32(array).astype(np.float64).reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)

    scores = split(q) @ split(k).swapaxes(2, 3) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mean: Array = (weights / weights.sum(-1, keepdims=True)) @ split(v)
    return mean.transpose(0, 2, 1, 3).reshape(q.shape)


@needs_kernels
@pytest.mark.parametrize("dim", [1, 8, 31, 32, 33, 40, 47, 48, 63, 64, 80, 160, 512])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 300), (33, 31), (64, 96), (70, 77), (300, 97)])
def test_any_sizes(dim: int, queries: int, keys: int) -> None:
    heads, scale = 3, dim**-0.5
    q, k, v = tokens(0, 2, queries, heads * dim), tokens(1, 2, keys, heads * dim), tokens(2, 2, keys, heads * dim)
    # Weights and result are of 8 bits each.
    assert error(attend(q, k, v, heads, scale), expected(q, k, v, heads, scale)) < 0.006


@needs_kernels
@pytest.mark.parametrize("length", [4096, 9216])
def test_stable_diffusions_own_sizes(length: int) -> None:
    q, k, v = (tokens(seed, 1, length, 2 * 40) for seed in range(3))
    assert error(attend(q, k, v, 2, 40**-0.5), expected(q, k, v, 2, 40**-0.5)) < 0.006


@needs_kernels
@pytest.mark.parametrize("rising", [True, False])
def test_scores_far_apart(rising: bool) -> None:
    q, k, v = tokens(0, 1, 64, 40, spread=8), tokens(1, 1, 1000, 40), tokens(2, 1, 1000, 40)
    first = fp32(q)[0, 0] / np.linalg.norm(fp32(q)[0, 0])
    order = np.argsort(fp32(k)[0] @ first)
    k = k[:, order if rising else order[::-1]].copy()
    scale = 2.0
    right = expected(q, k, v, 1, scale)
    assert np.ptp(fp32(q)[0, 0] @ fp32(k)[0].T * scale) > 200
    found = attend(q, k, v, 1, scale)
    assert error(found, right) < 0.006
    np.testing.assert_allclose(fp32(found)[0, 0], right[0, 0], atol=0.02)


@needs_kernels
def test_all_scores_far_below_zero() -> None:
    q, k, v = tokens(0, 1, 5, 40), tokens(1, 1, 97, 40), tokens(2, 1, 97, 40)
    k[:] = bf16(-100 * np.sign(fp32(q)[0, 0]))
    q[:] = q[:, :1]
    # What is put behind the keys to fill a tile has a score of nought, and is not to count.
    assert error(attend(q, k, v, 1, 1.0), expected(q, k, v, 1, 1.0)) < 0.006


@needs_kernels
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_not_hidden(where: str, bad: float) -> None:
    arrays = {name: tokens(seed, 1, 100, 80) for seed, name in enumerate("qkv")}
    arrays[where][0, 50, 3] = bf16(np.array([bad], np.float32))[0]
    found = fp32(attend(arrays["q"], arrays["k"], arrays["v"], 2, 40**-0.5))
    rows = [50] if where == "q" else range(100)
    assert not np.isfinite(found[0, rows, 3]).all()
    assert np.isfinite(found[0, :, 40:]).all(), "the other head"


@needs_kernels
def test_threads_change_nothing() -> None:
    q, k, v = (tokens(seed, 2, 1000, 5 * 40) for seed in range(3))
    found = [attend(q, k, v, 5, 0.2, threads) for threads in (1, 2, 3, 16, 1000)]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@needs_kernels
@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_fp16_bundle"])
def test_every_attention_of_a_unet(bundle: str, request: pytest.FixtureRequest) -> None:
    model = read(Bundle.open(request.getfixturevalue(bundle)))
    count = kinds(model).count("Softmax")
    assert attention.put_in(model) == count > 4
    model.validate_nodes_and_infer_types()
    assert kinds(model).count("SdrtAttention") == count
    assert "Softmax" not in kinds(model)


def masked(softmax: Any) -> None:
    """Let something be added to the scores, as a text encoder's mask is."""
    ops = openvino.opset13
    softmax.input(0).replace_source_output(ops.add(softmax.input_value(0), ops.constant(np.float32(0))).output(0))


def negative(softmax: Any) -> None:
    scaled = softmax.input_value(0).get_node().input_value(0).get_node()
    scaled.input(1).replace_source_output(openvino.opset13.constant(np.float32(-0.5)).output(0))


def other_axis(softmax: Any) -> None:
    softmax.output(0).replace(openvino.opset13.softmax(softmax.input_value(0), 2).output(0))


@needs_kernels
@pytest.mark.parametrize("change", [masked, negative, other_axis])
def test_what_is_no_such_attention_is_left_alone(change: Callable[[Any], None], tiny_bundle: Path) -> None:
    model = read(Bundle.open(tiny_bundle))
    softmaxes = [node for node in model.get_ordered_ops() if node.get_type_name() == "Softmax"]
    change(softmaxes[0])
    model.validate_nodes_and_infer_types()
    assert attention.put_in(model) == len(softmaxes) - 1
    assert kinds(model).count("Softmax") == 1
