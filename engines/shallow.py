"""The U-Net's outermost blocks as a graph of their own, for feature caching.

What the U-Net's last layer takes from below, the deep features, changes little from one step to the next: Ma et al.
2023 (DeepCache, arXiv:2312.00858) compute it in every k-th step alone. In the steps between, this graph makes the
prediction of it: the first convolution, the last layer and what follows, in Stable Diffusion v1 a twelfth of the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .manifest import DEEP_FEATURES
from .prune import prune

if TYPE_CHECKING:
    import onnx


def outer_blocks(unet: onnx.ModelProto) -> onnx.ModelProto:
    """Cut the graph that takes the deep features out of the one that gives them.

    Parameters
    ----------
    unet
        A U-Net of this project's export, weights loaded or not; it is left as it is.

    Returns
    -------
    onnx.ModelProto
        With the U-Net's inputs and `DEEP_FEATURES` to its prediction. Its weights are where the U-Net's are.

    """
    import onnx  # noqa: PLC0415 - only a build makes graphs
    from onnx import helper  # noqa: PLC0415

    model = onnx.ModelProto()
    model.CopyFrom(unet)
    graph = model.graph
    (features,) = (value for value in graph.output if value.name == DEEP_FEATURES)
    graph.input.append(features)
    graph.output.remove(features)
    nodes = [node for node in graph.node if DEEP_FEATURES not in node.output]
    (maker,) = (node for node in graph.node if DEEP_FEATURES in node.output)
    if maker.op_type == "Cast":
        # Layers compute in half precision, and what goes in and out is float32.
        (narrow,) = maker.input
        dtype = next(value.type.tensor_type.elem_type for value in graph.value_info if value.name == narrow)
        back = helper.make_node("Cast", [DEEP_FEATURES], [narrow], name=f"{maker.name}_back", to=dtype)
        nodes = [back, *(node for node in nodes if narrow not in node.output)]
    prune(graph, nodes)
    return model
