"""Guidance without computing twice what both of its rows have in common.

A guided step evaluates the U-Net on the same latents without the prompt and with it. Up to the first layer that reads
the text both rows are one: in Stable Diffusion v1 the first convolution, a residual block and one of the five
self-attentions over all pixels. It is the same arithmetic, done once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_LATENTS, _TIMESTEP = "latents", "timestep"


def compute_once(model: Any) -> bool:
    """Let a U-Net compute for one half of the batch what does not depend on more than latents and timestep.

    Parameters
    ----------
    model
        An ``openvino.Model`` of fixed shapes, changed in place, which will be given latents whose second half equals
        the first.

    Returns
    -------
    bool
        Whether it was changed: not if the batch is odd, nor if it reads no latents.

    Raises
    ------
    RuntimeError
        The graph has operations that do not go on with half a batch; the model is of no use any more.

    """
    from openvino import opset13  # noqa: PLC0415 - imported already, by whoever made the model

    latents = next((node for node in model.get_parameters() if node.friendly_name == _LATENTS), None)
    if latents is None or latents.get_output_shape(0)[0] % 2:
        return False
    rows = latents.get_output_shape(0)[0]
    nodes = model.get_ordered_ops()
    common = _common(nodes)
    shapes = {node.friendly_name: list(node.output(0).shape) for node in common}
    expected = [list(output.shape) for output in model.outputs]

    half = opset13.slice(latents, [0], [rows // 2], [1], [0])
    for target in latents.output(0).get_target_inputs():
        # Shapes are still those of the whole batch for all that comes after.
        if target.get_node().get_type_name() not in {"ShapeOf", "Slice"}:
            target.replace_source_output(half.output(0))
    names = {node.friendly_name for node in common}
    for node in common:
        shape = shapes[node.friendly_name]
        if len(shape) < 2 or shape[0] != rows:
            continue
        if node.get_type_name() in {"Reshape", "Broadcast"}:
            fixed = opset13.constant(np.array([rows // 2, *shape[1:]], np.int64))
            node.input(1).replace_source_output(fixed.output(0))
        after = [each for each in node.output(0).get_target_inputs() if each.get_node().friendly_name not in names]
        if after := [each for each in after if each.get_node().get_type_name() != "ShapeOf"]:
            whole = opset13.concat([node, node], 0)
            # An output of the model goes by the name of what gives it.
            whole.output(0).set_names(node.output(0).get_names())
            node.output(0).set_names(set())
            for target in after:
                target.replace_source_output(whole.output(0))
    model.validate_nodes_and_infer_types()
    if [list(output.shape) for output in model.outputs] != expected:
        raise RuntimeError(f"outputs have the shapes {[output.shape for output in model.outputs]}, not {expected}")
    return True


def _common(nodes: list[Any]) -> list[Any]:
    """Choose what depends on the latents, and besides on nothing but the timestep and weights."""
    told: dict[str, frozenset[str]] = {}
    for node in nodes:
        name = node.friendly_name
        if node.get_type_name() == "Parameter":
            told[name] = frozenset({name})
        else:
            told[name] = frozenset[str]().union(
                *(told[given.get_source_output().get_node().friendly_name] for given in node.inputs())
            )
    return [
        node
        for node in nodes
        if _LATENTS in told[node.friendly_name]
        and told[node.friendly_name] <= {_LATENTS, _TIMESTEP}
        and node.get_type_name() not in {"Parameter", "Result"}
    ]
