"""Attention in bf16 on the matrix units of a CPU (AMX), as an operation in OpenVINO's graphs.

At 512x512 in bf16, a third of a step of OpenVINO's own is attention: exponentials, and scores that are moved about.
``attention.c`` needs half of that. It is compiled when sdrt is installed, where there is a C compiler, and runs where
the CPU has AMX; elsewhere OpenVINO's own remains.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

LIBRARY = Path(__file__).with_name("libsdrt_attention.so.1")
"""What the installation compiles."""

_INT64 = ctypes.c_int64


@functools.cache
def kernel() -> Callable[..., int] | None:
    """Load the compiled function: None where it was not compiled, and where CPU or system have no AMX.

    It takes the addresses of q, k, v and the output, all bf16, then their batch, queries, keys, heads, numbers in a
    head, the scale, and the number of threads; and returns 0, or -1 for want of memory.
    """
    if sys.platform != "linux" or not LIBRARY.exists():
        return None
    try:
        library = ctypes.CDLL(os.fspath(LIBRARY))
    except OSError:  # of another processor or another C library
        return None
    if library.sdrt_attention_prepare():
        return None
    function = library.sdrt_attention
    function.argtypes = [*[ctypes.c_void_p] * 4, *[_INT64] * 5, ctypes.c_float, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


def put_in(model: Any) -> int:
    """Replace attention in a graph, if `kernel` gives something to replace it with.

    Parameters
    ----------
    model
        An ``openvino.Model`` of fixed shapes that will be compiled for bf16, changed in place.

    Returns
    -------
    int
        How many were replaced.

    """
    if kernel() is None:
        return 0
    from openvino import opset13  # noqa: PLC0415 - imported already, by whoever made the model

    count = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Softmax":
            continue
        try:
            found = _read(node)
        except _OtherGraphError:
            continue
        given = [opset13.convert(each, "bf16") for each in (found.q, found.k, found.v)]
        computed = _operation()(given, found.heads, found.scale)
        found.result.replace(opset13.convert(computed, found.q.element_type.to_string()).output(0))
        count += 1
    return count


class _Attention(NamedTuple):
    """What of a graph is ``softmax(scale q k^T) v``; q, k, v and the result have the heads side by side."""

    q: Any
    k: Any
    v: Any
    result: Any
    heads: int
    scale: float


class _OtherGraphError(Exception):
    """Something is not as attention of Stable Diffusion v1 is exported."""


def _read(softmax: Any) -> _Attention:
    """Read what a softmax is part of, as ``export/`` writes it."""
    shape = list(softmax.get_output_shape(0))
    if len(shape) != 4 or softmax.get_attributes()["axis"] not in {-1, 3}:
        raise _OtherGraphError
    scores = _given(softmax, 0, "MatMul")
    scaled = _given(scores, 0, "Multiply")
    q = _heads(scaled, 0, [0, 2, 1, 3])
    k = _heads(scores, 1, [0, 2, 3, 1])
    scale = _given(scaled, 1, "Constant")
    mean = _taken(softmax, "MatMul")
    v = _heads(mean, 1, [0, 2, 1, 3])
    back = _taken(mean, "Transpose")
    result = _taken(back, "Reshape").output(0)
    if (
        any(product.get_attributes()[flag] for product in (scores, mean) for flag in ("transpose_a", "transpose_b"))
        or _order(back) != [0, 2, 1, 3]
        or scale.data.size != 1
        or scale.data.item() <= 0
        or list(result.shape) != list(q.shape)
        or list(k.shape) != list(v.shape)
        or len(q.shape) != 3
        or any(each.element_type.to_string() not in {"f32", "f16"} for each in (q, k, v))
    ):
        raise _OtherGraphError
    return _Attention(q, k, v, result, shape[1], scale.data.item())


def _heads(node: Any, index: int, order: list[int]) -> Any:
    """Give what an input is before it was split into heads."""
    transposed = _given(node, index, "Transpose")
    if _order(transposed) != order:
        raise _OtherGraphError
    return _given(transposed, 0, "Reshape").input_value(0)


def _order(transpose: Any) -> list[int]:
    return [int(axis) for axis in _given(transpose, 1, "Constant").data]


# Graphs in fp16 convert the scores to fp32 and back, which bf16 does without.
def _given(node: Any, index: int, kind: str) -> Any:
    """Give the node that an input comes from."""
    found = node.input_value(index).get_node()
    while found.get_type_name() == "Convert":
        found = found.input_value(0).get_node()
    if found.get_type_name() != kind:
        raise _OtherGraphError
    return found


def _taken(node: Any, kind: str) -> Any:
    """Give the only node that takes an output, as its first input."""
    targets = list(node.output(0).get_target_inputs())
    if len(targets) != 1 or targets[0].get_index() != 0:
        raise _OtherGraphError
    found = targets[0].get_node()
    if found.get_type_name() == "Convert":
        return _taken(found, kind)
    if found.get_type_name() != kind:
        raise _OtherGraphError
    return found


@functools.cache
def _operation() -> Any:
    """Define the operation, for which OpenVINO has to be there."""
    from openvino import Op  # noqa: PLC0415 - imported already, by whoever made the model

    found, threads = kernel(), len(os.sched_getaffinity(0))
    assert found is not None
    compute = found

    class SdrtAttention(Op):  # type: ignore[misc]
        def __init__(self, inputs: Any = None, heads: int = 1, scale: float = 1) -> None:
            super().__init__(self, inputs)
            self._heads, self._scale = heads, scale

        def validate_and_infer_types(self) -> None:
            self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

        def clone_with_new_inputs(self, inputs: Any) -> SdrtAttention:
            return SdrtAttention(inputs, self._heads, self._scale)

        def visit_attributes(self, visitor: Any) -> bool:
            visitor.on_attributes({"heads": self._heads, "scale": self._scale})
            return True

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            batch, queries, width = inputs[0].shape
            keys = inputs[1].shape[1]
            addresses = (tensor.data.ctypes.data for tensor in (*inputs, outputs[0]))
            sizes = (batch, queries, keys, self._heads, width // self._heads)
            # Other threads of Python's go on meanwhile.
            return compute(*addresses, *sizes, self._scale, threads) == 0

    return SdrtAttention
