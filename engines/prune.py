"""What is left of a graph once its nodes were changed: neither work nor weights that no output needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx


def prune(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Give a graph other nodes, in place, and drop those that its outputs do not need, and weights that none reads.

    Parameters
    ----------
    graph
        Its outputs are what is needed.
    nodes
        In the order of computation; the graph's own may be among them.

    """
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            wanted.update(node.input)
            kept.append(node)
    weights = [tensor for tensor in graph.initializer if tensor.name in wanted]
    known = [value for value in graph.value_info if value.name in wanted]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(weights)
    graph.value_info.extend(known)
