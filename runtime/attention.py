"""Attention in bf16 on the matrix units of a CPU (AMX), in OpenVINO's graphs.

At 512x512 in bf16, a third of a step of OpenVINO's own is attention: exponentials, and scores that are moved about.
``attention.c`` needs half of that.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .kernels import Call, OtherGraphError, given, is_float, operation_class, replace_each, taken


def put_in(model: Any) -> int:
    """Replace attention in a graph, as `replace_each` does, and tell how many there were."""
    return replace_each(model, "Softmax", _replace)


def _replace(softmax: Any) -> None:
    from openvino import opset13  # noqa: PLC0415 - imported already, by whoever made the model

    found = _read(softmax)
    halves = [opset13.convert(each, "bf16").output(0) for each in (found.q, found.k, found.v)]
    computed = _operation()(halves, found.heads, found.scale)
    found.result.replace(opset13.convert(computed, found.result.element_type.to_string()).output(0))


class _Attention(NamedTuple):
    """What of a graph is ``softmax(scale q k^T) v``; q, k, v and the result have the heads side by side."""

    q: Any
    k: Any
    v: Any
    result: Any
    heads: int
    scale: float


def _read(softmax: Any) -> _Attention:
    """Read what a softmax is part of, as ``export/`` writes it."""
    shape = list(softmax.get_output_shape(0))
    if len(shape) != 4 or softmax.get_attributes()["axis"] not in {-1, 3}:
        raise OtherGraphError
    scores = given(softmax, 0, "MatMul")
    scaled = given(scores, 0, "Multiply")
    q = _heads(scaled, 0, [0, 2, 1, 3])
    k = _heads(scores, 1, [0, 2, 3, 1])
    scale = given(scaled, 1, "Constant")
    mean = taken(softmax, "MatMul")
    v = _heads(mean, 1, [0, 2, 1, 3])
    back = taken(mean, "Transpose")
    result = taken(back, "Reshape").output(0)
    if (
        any(product.get_attributes()[flag] for product in (scores, mean) for flag in ("transpose_a", "transpose_b"))
        or _order(back) != [0, 2, 1, 3]
        or scale.data.size != 1
        or scale.data.item() <= 0
        or list(result.shape) != list(q.shape)
        or list(k.shape) != list(v.shape)
        or len(q.shape) != 3
        or not is_float(q, k, v, result)
    ):
        raise OtherGraphError
    return _Attention(q, k, v, result, shape[1], scale.data.item())


def _heads(node: Any, index: int, order: list[int]) -> Any:
    """Give what an input is before it was split into heads."""
    transposed = given(node, index, "Transpose")
    if _order(transposed) != order:
        raise OtherGraphError
    return given(transposed, 0, "Reshape").input_value(0)


def _order(transpose: Any) -> list[int]:
    return [int(axis) for axis in given(transpose, 1, "Constant").data]


@functools.cache
def _operation() -> Any:
    class SdrtAttention(operation_class()):  # type: ignore[misc]
        def call(self, shapes: Any) -> Call:
            heads, scale = self.settings
            (batch, queries, width), keys = shapes[0], shapes[1][1]
            return Call("attention", (batch, queries, keys, heads, width // heads), scale)

    return SdrtAttention
