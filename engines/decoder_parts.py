"""The VAE decoder in parts, so that a picture can be decoded in tiles and come out as if decoded whole.

A decoder is convolutions, of which a tile needs but a few rows of its neighbours, and group normalisations (Wu & He
2018, arXiv:1803.08494), which take mean and variance over the whole picture. So tiles that are decoded one by one
differ from the whole, however far they overlap. Here the graph is cut at each normalisation instead: a stage runs over
all tiles before the next one begins, and mean and variance, which the caller finds meanwhile, are inputs of that one.
What comes before the last two upsamplings, the attention with it, is small, and stays one graph that runs whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cut import Part, channels_of, copy_making, dtype_of, set_ends
from .manifest import DECODER_HEAD, DECODER_STAGE, HIDDEN, MEAN, VARIANCE, DimRange, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx

_TILED_UPSAMPLINGS = 2


@dataclass(frozen=True)
class _Norm:
    """A group normalisation as it is traced.

    Attributes
    ----------
    source
        What is normalised, as the layer before gives it.
    wide, result
        The same in float32, and what comes of it.
    groups, epsilon, weight, bias
        Of the normalisation; the latter two are names.

    """

    source: str
    wide: str
    result: str
    groups: int
    epsilon: float
    weight: str
    bias: str


def cut_decoder(decoder: onnx.ModelProto, latents: TensorSpec, image: TensorSpec) -> tuple[Part, ...]:
    """Cut a decoder into its head and the stages after it.

    Parameters
    ----------
    decoder
        A VAE decoder of this project's export, weights loaded or not; it is left as it is.
    latents, image
        What it takes and gives.

    Returns
    -------
    tuple of Part
        In the order of computation; ``engines/README.md`` says how they go together.

    """
    graph = decoder.graph
    resizes = [index for index, node in enumerate(graph.node) if node.op_type == "Resize"]
    begin = resizes[-_TILED_UPSAMPLINGS]
    norms = list(_norms(graph, begin))
    cuts = [graph.node[begin].input[0], *(norm.source for norm in norms), image.name]
    head = _head(decoder, cuts[0], latents, 2 ** (len(resizes) - _TILED_UPSAMPLINGS))
    most = max(side.max for side in image.shape if isinstance(side, DimRange))
    return head, *(_stage(decoder, cuts, number, norm, most) for number, norm in enumerate([None, *norms], 1))


def _norms(graph: onnx.GraphProto, begin: int) -> Iterator[_Norm]:
    """Find the group normalisations after a node: by groups first, then scaled and shifted by channels."""
    made = {name: node for node in graph.node for name in node.output}
    reader = {name: node for node in graph.node for name in node.input}
    sizes = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in list(graph.node)[begin:]:
        if node.op_type != "InstanceNormalization":
            continue
        wide = made[node.input[0]].input[0]
        scaled = reader[reader[node.output[0]].output[0]]
        shifted = reader[scaled.output[0]]
        (epsilon,) = (attribute.f for attribute in node.attribute if attribute.name == "epsilon")
        yield _Norm(
            source=made[wide].input[0] if made[wide].op_type == "Cast" else wide,
            wide=wide,
            result=shifted.output[0],
            groups=sizes[node.input[1]][0],
            epsilon=epsilon,
            weight=scaled.input[1],
            bias=shifted.input[1],
        )


def _head(decoder: onnx.ModelProto, target: str, latents: TensorSpec, scale: int) -> Part:
    """Cut out what comes before the first value at which the decoder is cut."""
    model = copy_making(decoder, list(decoder.graph.node), [target])
    sides = [_scaled(side, f"hidden_{side.name}", scale) for side in latents.shape if isinstance(side, DimRange)][1:]
    output = TensorSpec(HIDDEN.format(0), "float32", (1, channels_of(decoder, target), *sides))
    inputs = (TensorSpec(latents.name, latents.dtype, (1, *latents.shape[1:])),)
    set_ends(model, inputs, {}, {target: output}, dtype_of(decoder, target))
    return Part(DECODER_HEAD, model, inputs, (output,))


def _stage(decoder: onnx.ModelProto, cuts: Sequence[str], number: int, norm: _Norm | None, most: int) -> Part:
    """Cut out what makes one of the values at which the decoder is cut of those before it."""
    target, before = cuts[number], cuts[:number]
    nodes = [node for node in decoder.graph.node if set(before).isdisjoint(node.output)]
    statistics: tuple[TensorSpec, ...] = ()
    if norm is not None:
        (place,) = (index for index, node in enumerate(nodes) if norm.result in node.output)
        nodes[place : place + 1] = _normalise(norm, channels_of(decoder, norm.source))
        statistics = tuple(TensorSpec(name, "float32", (norm.groups,)) for name in (MEAN, VARIANCE))
    model = copy_making(decoder, nodes, [target])
    read = {name for node in model.graph.node for name in node.input}
    tile = (DimRange("rows", 1, most), DimRange("columns", 1, most))
    # What the stage goes on from, and then, if anything, what it adds to that.
    given = {
        source: TensorSpec(HIDDEN.format(index), "float32", (1, channels_of(decoder, source), *tile))
        for index, source in reversed(list(enumerate(before)))
        if source in read
    }
    doubles = any(node.op_type == "Resize" for node in model.graph.node)
    sides = tuple(_scaled(side, f"doubled_{side.name}", 2) for side in tile) if doubles else tile
    name = HIDDEN.format(number) if number < len(cuts) - 1 else target
    output = TensorSpec(name, "float32", (1, channels_of(decoder, target), *sides))
    inputs = (*given.values(), *statistics)
    set_ends(model, inputs, given, {target: output}, dtype_of(decoder, before[0]))
    return Part(DECODER_STAGE.format(number), model, inputs, (output,))


def _normalise(norm: _Norm, channels: int) -> list[onnx.NodeProto]:
    """Make the nodes that normalise by a mean and a variance that are given: one factor and one summand a channel."""
    import numpy as np  # noqa: PLC0415 - only a build makes graphs
    from onnx import helper, numpy_helper  # noqa: PLC0415

    made: list[onnx.NodeProto] = []

    def constant(name: str, value: Any) -> str:
        made.append(
            helper.make_node("Constant", [], [name], name=name, value=numpy_helper.from_array(np.asarray(value)))
        )
        return name

    def node(kind: str, inputs: list[str], output: str) -> str:
        made.append(helper.make_node(kind, inputs, [output], name=output))
        return output

    by_group = constant("by_group", np.array([norm.groups, channels // norm.groups], np.int64))
    column = constant("column", np.array([norm.groups, 1], np.int64))
    by_channel = constant("by_channel", np.array([channels, 1, 1], np.int64))
    epsilon = constant("epsilon", np.float32(norm.epsilon))
    deviation = node("Sqrt", [node("Add", [VARIANCE, epsilon], "variance_and_epsilon")], "deviation")
    weight = node("Reshape", [norm.weight, by_group], "weight_by_group")
    factor = node("Div", [weight, node("Reshape", [deviation, column], "deviation_column")], "factor_by_group")
    offset = node("Mul", [factor, node("Reshape", [MEAN, column], "mean_column")], "offset_by_group")
    factor = node("Reshape", [factor, by_channel], "factor")
    offset = node("Reshape", [offset, by_channel], "offset")
    summand = node("Sub", [norm.bias, offset], "summand")
    node("Add", [node("Mul", [norm.wide, factor], "scaled"), summand], norm.result)
    return made


def _scaled(side: DimRange, name: str, scale: int) -> DimRange:
    return DimRange(name, scale * side.min, scale * side.max, multiple_of=scale)
