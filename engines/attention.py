"""Attention as one node, for onnxruntime, which computes it without ever holding all scores.

A traced graph spells attention out: split heads, multiply, softmax, multiply, merge heads. TensorRT and OpenVINO find
that by themselves. onnxruntime does not, in graphs of this exporter, and has ``com.microsoft.MultiHeadAttention`` for
it: at 4096 tokens 27 MB instead of 1093.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .bundle import merged_name, onnx_name
from .prune import prune

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx

DOMAIN = "com.microsoft"
_SPLIT, _MERGE, _SPLIT_AND_TURN = [0, 2, 1, 3], [0, 2, 1, 3], [0, 2, 3, 1]


@dataclass(frozen=True)
class _Graph:
    """Who makes a value, who reads it, and which values are constant."""

    made: Mapping[str, onnx.NodeProto]
    read: Mapping[str, list[onnx.NodeProto]]
    constants: Mapping[str, onnx.TensorProto]

    def maker(self, name: str, kind: str) -> onnx.NodeProto | None:
        """Return the node that makes a value if it is of a kind, looking through a Cast."""
        node = self.made.get(name)
        if node is not None and node.op_type == "Cast" != kind:
            node = self.made.get(node.input[0])
        return node if node is not None and node.op_type == kind else None

    def reader(self, name: str, kind: str) -> onnx.NodeProto | None:
        """Return the only node that reads a value if it is of a kind, looking through a Cast."""
        readers = self.read.get(name, [])
        if len(readers) == 1 and readers[0].op_type == "Cast" != kind:
            readers = self.read.get(readers[0].output[0], [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None


def merge_attention(model: onnx.ModelProto) -> int:
    """Replace each attention without a mask by one MultiHeadAttention node, in place.

    Parameters
    ----------
    model
        A graph of this project's export, weights loaded or not.

    Returns
    -------
    int
        How many were replaced.

    """
    import onnx  # noqa: PLC0415 - only a build rewrites graphs

    graph = model.graph
    found = _Graph(
        {name: node for node in graph.node for name in node.output},
        _readers(graph),
        {tensor.name: tensor for tensor in graph.initializer},
    )
    merged = [node for softmax in graph.node if softmax.op_type == "Softmax" and (node := _merged(found, softmax))]
    if not merged:
        return 0
    replaced = {node.output[0]: node for node in merged}
    prune(graph, [replaced.get(node.output[0], node) for node in graph.node])
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return len(merged)


def write_merged(folder: Path, component: str) -> list[str]:
    """Write a component's graph with attention as one node, if it has any, and name all graphs that share its weights.

    Parameters
    ----------
    folder
        Where its graph is, and the other shall be.
    component
        The component's name.

    """
    import onnx  # noqa: PLC0415 - only a build rewrites graphs

    model = onnx.load(folder / onnx_name(component), load_external_data=False)
    if not merge_attention(model):
        return [onnx_name(component)]
    onnx.save(model, folder / merged_name(component))
    return [onnx_name(component), merged_name(component)]


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _merged(graph: _Graph, softmax: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return the node that does what the nodes around a softmax do, if they are an attention."""
    from onnx import helper, numpy_helper  # noqa: PLC0415

    scores = graph.maker(softmax.input[0], "MatMul")
    mixed = graph.reader(softmax.output[0], "MatMul")
    scaled = graph.maker(scores.input[0], "Mul") if scores else None
    merge = graph.reader(mixed.output[0], "Transpose") if mixed else None
    out = graph.reader(merge.output[0], "Reshape") if merge else None
    if scores is None or mixed is None or scaled is None or merge is None or out is None:
        return None
    scale = graph.constants.get(scaled.input[1])
    parts = (
        _split(graph, scaled.input[0], _SPLIT),
        _split(graph, scores.input[1], _SPLIT_AND_TURN),
        _split(graph, mixed.input[1], _SPLIT),
    )
    if scale is None or not all(parts) or _order(merge) != _MERGE:
        return None
    (query, heads), (key, _), (value, _) = (part for part in parts if part)
    return helper.make_node(
        "MultiHeadAttention",
        [query, key, value],
        [out.output[0]],
        name=softmax.name,
        domain=DOMAIN,
        num_heads=heads,
        scale=float(numpy_helper.to_array(scale)),
    )


def _split(graph: _Graph, name: str, order: list[int]) -> tuple[str, int] | None:
    """Find what was split into heads, (batch, tokens, width), and into how many."""
    from onnx import numpy_helper  # noqa: PLC0415

    turned = graph.maker(name, "Transpose")
    split = graph.maker(turned.input[0], "Reshape") if turned is not None and _order(turned) == order else None
    if split is None:
        return None
    # (batch, tokens, heads, width): put together while it runs, or constant where the number of tokens is
    known = graph.constants.get(split.input[1])
    shape = graph.maker(split.input[1], "Concat")
    heads = graph.constants.get(shape.input[2]) if shape is not None and len(shape.input) == 4 else None
    if known is not None:
        return split.input[0], int(numpy_helper.to_array(known)[2])
    return (split.input[0], int(numpy_helper.to_array(heads)[0])) if heads is not None else None


def _order(transpose: onnx.NodeProto) -> list[int]:
    return list(transpose.attribute[0].ints)
