"""A piece of a graph as a graph of its own, that reads the same weights where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .prune import prune

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx

    from .manifest import TensorSpec


@dataclass(frozen=True)
class Part:
    """A piece of a network.

    Attributes
    ----------
    name
        Of the component.
    model
        Its graph, whose weights are where the whole network's are.
    inputs, outputs
        In the graph's order.

    """

    name: str
    model: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def copy_making(whole: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], targets: Sequence[str]) -> onnx.ModelProto:
    """Copy a graph with other nodes, and of these with those alone that make some values, which are its outputs."""
    import onnx  # noqa: PLC0415 - only a build makes graphs

    model = onnx.ModelProto()
    model.CopyFrom(whole)
    del model.graph.output[:]
    for target in targets:
        model.graph.output.add().name = target
    prune(model.graph, nodes)
    # They may have other sizes now, under the names of the whole's.
    del model.graph.value_info[:]
    return model


def set_ends(
    model: onnx.ModelProto,
    inputs: Sequence[TensorSpec],
    given: Mapping[str, TensorSpec],
    made: Mapping[str, TensorSpec],
    dtype: int,
) -> None:
    """Give a graph its inputs and outputs, float32 outside whatever the layers compute in, in place.

    Parameters
    ----------
    model
        Of `copy_making`.
    inputs
        All of them.
    given
        Of these, by its name in the whole graph, what was computed there.
    made
        The outputs, by their names in the whole graph.
    dtype
        What the layers compute in.

    """
    from onnx import TensorProto, helper  # noqa: PLC0415

    graph = model.graph
    names = {source: spec.name for source, spec in (*given.items(), *made.items())}
    if dtype == TensorProto.FLOAT:
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
    else:
        enter = [
            helper.make_node("Cast", [spec.name], [source], name=f"{spec.name}_cast", to=dtype)
            for source, spec in given.items()
        ]
        leave = [
            helper.make_node("Cast", [source], [spec.name], name=f"{spec.name}_cast", to=TensorProto.FLOAT)
            for source, spec in made.items()
            if source != spec.name
        ]
        nodes = [*enter, *graph.node, *leave]
        del graph.node[:]
        graph.node.extend(nodes)
    del graph.input[:], graph.output[:]
    graph.input.extend(map(_value, inputs))
    graph.output.extend(map(_value, made.values()))


def channels_of(whole: onnx.ModelProto, name: str) -> int:
    """Tell how many channels a value of a graph has."""
    return int(_info(whole, name).shape.dim[1].dim_value)


def dtype_of(whole: onnx.ModelProto, name: str) -> int:
    """Tell a value's dtype, in ONNX's numbers."""
    return int(_info(whole, name).elem_type)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    from onnx import TensorProto, helper  # noqa: PLC0415

    shape = [size if isinstance(size, int) else size.name for size in spec.shape]
    return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, shape)


def _info(whole: onnx.ModelProto, name: str) -> onnx.TypeProto.Tensor:
    (value,) = (each for each in (*whole.graph.value_info, *whole.graph.output) if each.name == name)
    found: onnx.TypeProto.Tensor = value.type.tensor_type
    return found
