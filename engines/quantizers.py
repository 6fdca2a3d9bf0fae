"""The quantisers of a graph, pairs of QuantizeLinear and DequantizeLinear: who shares them, and taking them out.

NNCF puts one pair before each layer and one behind its weights. Where the pairs stay, runtimes compute the layer in
integers; where they are taken out again, it computes as it did.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .prune import prune

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path
    from typing import BinaryIO

    import numpy as np
    import onnx
    from numpy.typing import NDArray

LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
_DEQUANTIZE = "DequantizeLinear"
# As runtimes map weights into memory; what is smaller stays in the graph.
_ALIGNMENT = 64
_SMALLEST_OUTSIDE = 1024


@dataclass(frozen=True)
class Group:
    """Layers that read the same tensor, and so one quantiser.

    Attributes
    ----------
    layers
        Names of their nodes.
    values
        Names of what the dequantisers give: the tensor, and the weights of each layer.

    """

    layers: tuple[str, ...]
    values: frozenset[str]


def weighted_layers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Find the products with weights, quantised or not, by name; those of two activations are none."""
    weights = {tensor.name for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}

    def is_weight(name: str) -> bool:
        while (node := made.get(name)) is not None and node.op_type in {_DEQUANTIZE, "QuantizeLinear"}:
            name = node.input[0]
        return name in weights

    return {node.name: node for node in graph.node if node.op_type in LAYERS and is_weight(node.input[1])}


def groups(graph: onnx.GraphProto) -> tuple[Group, ...]:
    """Find all quantised layers, in the order of computation."""
    made = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for layer in weighted_layers(graph).values():
        if all(name in made and made[name].op_type == _DEQUANTIZE for name in layer.input[:2]):
            readers[layer.input[0]].append(layer)
    return tuple(
        Group(tuple(layer.name for layer in layers), frozenset({tensor, *(layer.input[1] for layer in layers)}))
        for tensor, layers in readers.items()
    )


def without(model: onnx.ModelProto, left_alone: Collection[Group]) -> onnx.ModelProto:
    """Give a graph without the quantisers of some layers; the graph itself is left as it is."""
    import onnx  # noqa: PLC0415 - only a build makes graphs

    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    graph = plain.graph
    made = {name: node for node in graph.node for name in node.output}
    original = {value: made[made[value].input[0]].input[0] for group in left_alone for value in group.values}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in original:
                node.input[index] = original[name]
    prune(graph, list(graph.node))
    return plain


def make_unsigned(graph: onnx.GraphProto) -> None:
    """Shift what layers read from int8 to uint8, in place, which changes no result.

    OpenVINO convolves integers that are signed and have a zero point, as NNCF leaves them, in float32.
    """
    import numpy as np  # noqa: PLC0415 - only a build makes graphs
    from onnx import TensorProto, numpy_helper  # noqa: PLC0415

    constants = {tensor.name: tensor for tensor in graph.initializer}
    shifted = set()
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in constants:
            continue
        zero_point = constants[node.input[2]]
        if zero_point.data_type == TensorProto.INT8:
            value = numpy_helper.to_array(zero_point).astype(np.int16) + 128
            zero_point.CopyFrom(numpy_helper.from_array(value.astype(np.uint8), zero_point.name))
            shifted |= {zero_point.name, node.output[0]}
    for info in graph.value_info:
        if info.name in shifted:
            info.type.tensor_type.elem_type = TensorProto.UINT8


def store_weights(model: onnx.ModelProto, source: Path, target: Path) -> None:
    """Quantise the weights that have a quantiser, and write all of a graph's weights to a file of their own.

    Parameters
    ----------
    model
        Changed in place: its weights are integers where they are dequantised, and lie in `target`.
    source
        The folder of the files in which its weights lie.
    target
        The file to write, which will lie beside the graph.

    """
    from onnx import numpy_helper  # noqa: PLC0415 - only a build makes graphs

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    quantizers = {
        node.input[0]: node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in constants
    }
    with target.open("wb") as file:
        for tensor in graph.initializer:
            quantizer = quantizers.get(tensor.name)
            if quantizer is None and not tensor.external_data:
                continue
            array = numpy_helper.to_array(tensor, str(source))
            if quantizer is not None:
                array = _quantized(array, quantizer, constants)
            name = tensor.name if quantizer is None else quantizer.output[0]
            tensor.CopyFrom(numpy_helper.from_array(array, name))
            if len(tensor.raw_data) >= _SMALLEST_OUTSIDE:
                _move_out(tensor, file, target.name)
    folded = {quantizer.output[0] for quantizer in quantizers.values()}
    prune(graph, [node for node in graph.node if not folded & set(node.output)])


def _quantized(
    array: NDArray[np.float32], quantizer: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
) -> NDArray[np.int8]:
    """Compute what QuantizeLinear makes of weights: one scale for each output channel, and zero as it is."""
    import numpy as np  # noqa: PLC0415 - only a build makes graphs
    from onnx import numpy_helper  # noqa: PLC0415

    scale, zero_point = (numpy_helper.to_array(constants[name]) for name in quantizer.input[1:3])
    if scale.ndim:
        axis = next(attribute.i for attribute in quantizer.attribute if attribute.name == "axis") % array.ndim
        sides = [-1 if axis == each else 1 for each in range(array.ndim)]
        scale, zero_point = scale.reshape(sides), zero_point.reshape(sides)
    limits = np.iinfo(zero_point.dtype)
    rounded = np.rint(array / scale) + zero_point
    quantized: NDArray[np.int8] = np.clip(rounded, limits.min, limits.max).astype(zero_point.dtype)
    return quantized


def _move_out(tensor: onnx.TensorProto, file: BinaryIO, name: str) -> None:
    """Append a tensor's bytes to a file, and say in the tensor where they are."""
    from onnx.external_data_helper import set_external_data  # noqa: PLC0415 - only a build makes graphs

    file.write(bytes(-file.tell() % _ALIGNMENT))
    set_external_data(tensor, name, file.tell(), len(tensor.raw_data))
    file.write(tensor.raw_data)
    tensor.ClearField("raw_data")
