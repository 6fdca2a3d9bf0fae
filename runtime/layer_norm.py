"""Layer normalisation in OpenVINO's graphs in bf16: one operation, in ``layer_norm.c``, for two of OpenVINO's."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from .kernels import Call, OtherGraphError, given, is_float, operation_class, replace_each, taken

_LANES = 16  # of channels, in the kernel


def put_in(model: Any) -> int:
    """Replace layer normalisation in a graph, as `replace_each` does, and tell how many there were."""
    return replace_each(model, "MVN", _replace)


def _replace(mvn: Any) -> None:
    from openvino import opset13  # noqa: PLC0415 - imported already, by whoever made the model

    x, facts = mvn.input_value(0), mvn.get_attributes()
    rank, channels = len(x.shape), x.shape[-1]
    axes = mvn.input_value(1).get_node()
    multiplied = taken(mvn, "Multiply")
    added = taken(multiplied, "Add")
    scale, shift = (given(node, 1, "Constant").data for node in (multiplied, added))
    if (
        channels % _LANES
        or _axes(axes) not in ([rank - 1], [-1])
        or not facts["normalize_variance"]
        or facts["eps_mode"] != "INSIDE_SQRT"
        or not scale.shape == shift.shape == (channels,)
        or not is_float(x, added.output(0))
    ):
        raise OtherGraphError
    numbers = [opset13.constant(np.array(each, np.float32)) for each in (scale, shift)]
    inputs = [each.output(0) for each in (opset13.convert(x, "bf16"), *numbers)]
    computed = opset13.convert(_operation()(inputs, facts["eps"]), added.get_element_type().to_string())
    added.output(0).replace(computed.output(0))


def _axes(node: Any) -> list[int]:
    """Give the numbers of a constant, or of a range of constants."""
    if node.get_type_name() == "Range":
        bounds = [int(given(node, index, "Constant").data.item()) for index in range(3)]
        return list(range(*bounds))
    if node.get_type_name() != "Constant":
        raise OtherGraphError
    return [int(axis) for axis in node.data]


@functools.cache
def _operation() -> Any:
    class SdrtLayerNorm(operation_class()):  # type: ignore[misc]
        def call(self, shapes: Any) -> Call:
            (epsilon,) = self.settings
            *rows, channels = shapes[0]
            return Call("layer_norm", (math.prod(rows), channels), epsilon)

    return SdrtLayerNorm
