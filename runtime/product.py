"""Convolutions and products with weights in OpenVINO's graphs in bf16, and what is done to their results.

``product.c`` multiplies faster than OpenVINO's kernels, and finishes what it has multiplied while it is in the cache.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .kernels import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    Call,
    OtherGraphError,
    given,
    is_float,
    kernels,
    operation_class,
    replace_each,
    rounds,
)
from .packed_weights import PackedWeights
from .program import aligned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

DOUBLED, HALVED = 2, -2
"""How a convolution resizes a picture, if not by 1: each pixel becomes four before, or every second is computed."""

_BLOCK = 32  # of channels and of outputs, in the kernel
_LEAST_ROWS = 16


def put_in(model: Any, packed: PackedWeights | None = None) -> int:
    """Replace convolutions and products with weights in a graph, as `replace_each` does, and tell how many there were.

    With `packed`, weights that another model of the same graph has had are not packed again.
    """
    packed = PackedWeights() if packed is None else packed
    replacements = {"Gelu": _replace_gated, "MatMul": _replace_product, "Convolution": _replace_convolution}
    return sum(
        replace_each(model, kind, functools.partial(replace, packed=packed)) for kind, replace in replacements.items()
    )


class _Weights(NamedTuple):
    """Numbers of a constant, and how far apart they are by output, input channel and offset."""

    name: str
    numbers: Any
    channels: int
    outputs: int
    side: int
    by_output: int
    by_channel: int
    by_tap: int


def _weights(node: Any) -> _Weights:
    constant = given(node, 1, "Constant")
    numbers = constant.data
    if node.get_type_name() == "Convolution":
        outputs, channels, side, other = numbers.shape
        if side != other:
            raise OtherGraphError
        apart = channels * side * side, side * side, 1
    else:
        if numbers.ndim != 2:
            raise OtherGraphError
        side = 1
        if node.get_attributes()["transpose_b"]:
            (outputs, channels), apart = numbers.shape, (numbers.shape[1], 1, 0)
        else:
            (channels, outputs), apart = numbers.shape, (1, numbers.shape[1], 0)
    if channels % _BLOCK or outputs % _BLOCK:
        raise OtherGraphError
    return _Weights(constant.friendly_name, numbers, channels, outputs, side, *apart)


def _constant(packed: PackedWeights, *parts: _Weights) -> Any:
    """Give the weights of one product, or of two whose outputs take turns, as a constant of a graph."""
    from openvino import opset13  # noqa: PLC0415 - imported already, by whoever made the model

    nbytes = sum(part.numbers.size for part in parts) * 2
    found = packed.get([part.name for part in parts], nbytes, functools.partial(_pack, parts))
    return opset13.constant(found, shared_memory=True)


def _pack(parts: Sequence[_Weights]) -> NDArray[np.uint8]:
    found = kernels()
    assert found is not None
    packed = aligned(sum(part.numbers.size for part in parts) * 2)
    for index, part in enumerate(parts):
        numbers = np.ascontiguousarray(part.numbers, np.float32)
        apart = part.by_output, part.by_channel, part.by_tap
        sizes = part.channels, part.outputs, part.side**2
        found.pack(numbers.ctypes.data, packed.ctypes.data, *sizes, *apart, index, len(parts), found.threads)
    return packed


class _End(NamedTuple):
    """What a product becomes by what is added to it: the last result, a bias of outputs by batch, another array."""

    result: Any
    bias: Any
    residual: Any


def _only_user(output: Any, kind: str) -> tuple[Any, int] | None:
    """Give the only node that takes an output, and which of its two inputs the output is not; None if it is another."""
    targets = list(output.get_target_inputs())
    if len(targets) != 1:
        return None
    node = targets[0].get_node()
    if rounds(node):
        return _only_user(node.output(0), kind)
    return (node, 1 - targets[0].get_index()) if node.get_type_name() == kind else None


def _bias(node: Any, index: int, outputs: int, after: int) -> Any:
    """Give the constant of one number for each output that an input is, by way of a change of its shape or not.

    So many axes come after that of the outputs. None if it is none.
    """
    shape = list(node.input_value(index).shape)
    is_larger = len(shape) > len(node.input_value(1 - index).shape)
    if is_larger or shape[-after - 1 :] != [outputs, *[1] * after] or math.prod(shape) != outputs:
        return None
    try:
        return np.array(given(given(node, index, "Reshape"), 0, "Constant").data, np.float32).reshape(1, -1)
    except OtherGraphError:
        pass
    try:
        return np.array(given(node, index, "Constant").data, np.float32).reshape(1, -1)
    except OtherGraphError:
        return None


def _end(output: Any, outputs: int, axis: int) -> _End:
    """Follow what is added to a product whose outputs lie along an axis."""
    from openvino import opset13  # noqa: PLC0415 - imported already, by whoever made the model

    bias = np.zeros((1, outputs), np.float32)
    shape = list(output.shape)
    user = _only_user(output, "Add")
    constant = None if user is None else _bias(*user, outputs, len(shape) - 1 - axis)
    if user is not None and constant is not None:
        bias, output = constant, user[0].output(0)
    bias = opset13.constant(bias).output(0)
    added = [size if index in {0, axis} else 1 for index, size in enumerate(shape)]
    if (user := _only_user(output, "Add")) and len(shape) == 4:
        value = user[0].input_value(user[1])
        if list(value.shape) in (added, [1, *added[1:]]) and is_float(value):
            # In the other order OpenVINO 2026.4 gives something else for fp16.
            flat = opset13.reshape(opset13.convert(value, "f32"), np.array([-1, outputs]), special_zero=False)
            bias, output = opset13.add(flat, bias).output(0), user[0].output(0)
    other = None
    if user := _only_user(output, "Add"):
        value = user[0].input_value(user[1])
        if list(value.shape) == shape and list(user[0].get_output_shape(0)) == shape and is_float(value):
            other, output = value, user[0].output(0)
    return _End(output, bias, other)


def _replace_product(node: Any, packed: PackedWeights) -> None:
    from openvino import opset13  # noqa: PLC0415 - imported already, by whoever made the model

    x = node.input_value(0)
    weights = _weights(node)
    if (
        node.get_attributes()["transpose_a"]
        or not is_float(x, node.output(0))
        or len(x.shape) not in {2, 3}
        or math.prod(list(x.shape)[:-1]) < _LEAST_ROWS
    ):
        raise OtherGraphError
    end = _end(node.output(0), weights.outputs, len(x.shape) - 1)
    inputs = [opset13.convert(x, "bf16"), _constant(packed, weights), end.bias]
    if end.residual is not None:
        inputs.append(opset13.convert(end.residual, "bf16"))
    _put(end.result, opset13.convert(_operation()(_outputs(inputs), 1, 1, weights.outputs, 0), _kind(end.result)))


def _replace_gated(gelu: Any, packed: PackedWeights) -> None:
    """Replace ``values * gelu(gates)``, both of them products of the same with weights."""
    from openvino import opset13  # noqa: PLC0415 - imported already, by whoever made the model

    gates = given(gelu, 0, "Add")
    user = _only_user(gelu.output(0), "Multiply")
    if gelu.get_attributes()["approximation_mode"] != "ERF" or user is None:
        raise OtherGraphError
    values = given(*user, "Add")
    products = [given(each, 0, "MatMul") for each in (values, gates)]
    x, other = (product.input_value(0) for product in products)
    weights = [_weights(product) for product in products]
    outputs = weights[0].outputs
    biases = [_bias(each, 1, outputs, 0) for each in (values, gates)]
    result = user[0].output(0)
    if (
        (x.get_node().friendly_name, x.get_index()) != (other.get_node().friendly_name, other.get_index())
        or any(product.get_attributes()["transpose_a"] for product in products)
        or weights[1].outputs != outputs
        or weights[1].channels != weights[0].channels
        or biases[0] is None
        or biases[1] is None
        or not is_float(x, result)
        or len(x.shape) not in {2, 3}
        or math.prod(list(x.shape)[:-1]) < _LEAST_ROWS
    ):
        raise OtherGraphError
    bias = np.stack([each.reshape(-1, 16) for each in biases], 1).reshape(1, -1)
    inputs = [opset13.convert(x, "bf16"), _constant(packed, *weights), opset13.constant(bias)]
    computed = _operation()(_outputs(inputs), 1, 1, 2 * outputs, 1)
    _put(result, opset13.convert(computed, _kind(result)))


def _replace_convolution(node: Any, packed: PackedWeights) -> None:
    from openvino import opset13  # noqa: PLC0415 - imported already, by whoever made the model

    x = node.input_value(0)
    weights = _weights(node)
    facts = node.get_attributes()
    around = weights.side // 2
    if (
        weights.side not in {1, 3}
        or (weights.side == 1 and list(facts["strides"]) != [1, 1])
        or len(x.shape) != 4
        or list(facts["strides"]) not in ([1, 1], [2, 2])
        or any(value != 1 for value in facts["dilations"])
        or any(value != around for value in (*facts["pads_begin"], *facts["pads_end"]))
        or facts["auto_pad"] != "explicit"
        or not is_float(x, node.output(0))
    ):
        raise OtherGraphError
    end = _end(node.output(0), weights.outputs, 1)
    resize = HALVED if list(facts["strides"]) == [2, 2] else 1
    if resize == 1 and weights.side == 3 and (smaller := _doubled(x)) is not None:
        x, resize = smaller, DOUBLED
    inputs = [_last(x), _constant(packed, weights), end.bias]
    if end.residual is not None:
        inputs.append(_last(end.residual))
    computed = opset13.convert(
        _operation()(_outputs(inputs), weights.side, resize, weights.outputs, 0), _kind(end.result)
    )
    _put(end.result, opset13.transpose(computed, np.array(CHANNELS_FIRST)))


def _doubled(x: Any) -> Any:
    """Give what an array is twice as high and wide as, each pixel four times; None if it is not."""
    node = x.get_node()
    if node.get_type_name() != "Interpolate":
        return None
    facts, smaller = node.get_attributes(), node.input_value(0)
    before, after = list(smaller.shape), list(x.shape)
    if (
        facts["mode"] != "nearest"
        or facts["coordinate_transformation_mode"] != "asymmetric"
        or facts["nearest_mode"] != "floor"
        or after != [*before[:2], 2 * before[2], 2 * before[3]]
    ):
        return None
    return smaller


def _last(x: Any) -> Any:
    from openvino import opset13  # noqa: PLC0415 - imported already, by whoever made the model

    return opset13.convert(opset13.transpose(x, np.array(CHANNELS_LAST)), "bf16")


def _outputs(nodes: list[Any]) -> list[Any]:
    return [node.output(0) if hasattr(node, "output") else node for node in nodes]


def _kind(output: Any) -> str:
    return str(output.element_type.to_string())


def _put(result: Any, node: Any) -> None:
    result.replace(node.output(0))


@functools.cache
def _operation() -> Any:
    class SdrtProduct(operation_class()):  # type: ignore[misc]
        def validate_and_infer_types(self) -> None:
            from openvino import PartialShape  # noqa: PLC0415 - imported already

            _, resize, outputs, gated = self.settings
            batch, *sizes, _ = self.get_input_shape(0)
            resized = {1: lambda size: size, DOUBLED: lambda size: 2 * size, HALVED: lambda size: (size + 1) // 2}[
                resize
            ]
            shape = [batch, *map(resized, sizes), outputs // (1 + gated)]
            self.set_output_type(0, self.get_input_element_type(0), PartialShape(shape))

        def call(self, shapes: Any) -> Call:
            side, resize, outputs, gated = self.settings
            batch, *sizes, channels = shapes[0]
            height, width = (1, 1, *sizes)[-2:]
            biases = shapes[2][0]
            return Call("product", (batch, height, width, channels, outputs, side, resize, biases, gated))

    return SdrtProduct
