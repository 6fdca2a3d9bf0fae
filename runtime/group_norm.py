"""Group normalisation, and the SiLU after it, in OpenVINO's graphs in bf16.

OpenVINO normalises with one channel after the other, and moves everything there and back, since convolutions have the
channels side by side. ``group_norm.c`` takes it as it is.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from .kernels import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    Call,
    OtherGraphError,
    given,
    is_float,
    operation_class,
    replace_each,
    taken,
)

_LANES = 16  # of channels, in the kernel


def put_in(model: Any) -> int:
    """Replace group normalisation in a graph, as `replace_each` does, and tell how many there were."""
    return replace_each(model, "MVN", _replace)


def _replace(mvn: Any) -> None:
    from openvino import opset13  # noqa: PLC0415 - imported already, by whoever made the model

    found = _read(mvn)
    last = opset13.convert(opset13.transpose(found.x, np.array(CHANNELS_LAST)), "bf16")
    inputs = [last, opset13.constant(found.scale), opset13.constant(found.shift)]
    computed = _operation()([each.output(0) for each in inputs], found.groups, found.epsilon, int(found.silu))
    kind = found.result.element_type.to_string()
    first = opset13.transpose(opset13.convert(computed, kind), np.array(CHANNELS_FIRST))
    found.result.replace(first.output(0))


class _GroupNorm(NamedTuple):
    """What of a graph is group normalisation of x [batch, channels, height, width]."""

    x: Any
    result: Any
    scale: Any
    shift: Any
    groups: int
    epsilon: float
    silu: bool


def _read(mvn: Any) -> _GroupNorm:
    """Read what a normalisation is part of, as ``export/`` writes it."""
    grouped = given(mvn, 0, "Reshape")
    x = grouped.input_value(0)
    shape, groups = list(x.shape), list(mvn.get_output_shape(0))
    facts = mvn.get_attributes()
    if (
        len(shape) != 4
        or len(groups) != 3
        or shape[0] != groups[0]
        or shape[1] % _LANES
        or shape[1] % groups[1]
        or [int(axis) for axis in given(mvn, 1, "Constant").data] not in ([2], [-1])
        or not facts["normalize_variance"]
        or facts["eps_mode"] != "INSIDE_SQRT"
    ):
        raise OtherGraphError
    # What ONNX's InstanceNormalization scales and shifts by, which is nothing here.
    scaled = taken(mvn, "Multiply")
    shifted = taken(scaled, "Add")
    if (_numbers(scaled) != 1).any() or (_numbers(shifted) != 0).any():
        raise OtherGraphError
    whole = taken(shifted, "Reshape")
    multiplied = taken(whole, "Multiply")
    added = taken(multiplied, "Add")
    scale, shift = _of_channels(multiplied, shape[1]), _of_channels(added, shape[1])
    end = _silu(added) or added
    if list(whole.get_output_shape(0)) != shape or not is_float(x, end.output(0)):
        raise OtherGraphError
    return _GroupNorm(x, end.output(0), scale, shift, groups[1], facts["eps"], end is not added)


def _numbers(node: Any) -> Any:
    """Give the constant that a node's second input is, by way of a change of its shape or not."""
    try:
        return given(given(node, 1, "Reshape"), 0, "Constant").data
    except OtherGraphError:
        return given(node, 1, "Constant").data


def _of_channels(node: Any, channels: int) -> Any:
    """Give a constant with one number for each channel."""
    numbers = _numbers(node)
    if numbers.size != channels or list(node.input_value(1).shape)[-3:] != [channels, 1, 1]:
        raise OtherGraphError
    return np.array(numbers, np.float32).reshape(-1)


def _silu(node: Any) -> Any:
    """Give the product with its own sigmoid that is all that a node's output is for; None if there is another use."""
    users = {target.get_node().get_type_name(): target.get_node() for target in node.output(0).get_target_inputs()}
    if set(users) != {"Sigmoid", "Multiply"} or len(node.output(0).get_target_inputs()) != 2:
        return None
    product, gate = users["Multiply"], users["Sigmoid"]
    gates = [target.get_node() for target in gate.output(0).get_target_inputs()]
    return product if [each.friendly_name for each in gates] == [product.friendly_name] else None


@functools.cache
def _operation() -> Any:
    class SdrtGroupNorm(operation_class()):  # type: ignore[misc]
        def call(self, shapes: Any) -> Call:
            groups, epsilon, silu = self.settings
            rows, height, width, channels = shapes[0]
            return Call("group_norm", (rows, height * width, channels, groups, silu), epsilon)

    return SdrtGroupNorm
