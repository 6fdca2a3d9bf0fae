"""All operations of ours, put into a graph together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import attention, group_norm, layer_norm, product
from .channels_last import connect
from .program import contract

if TYPE_CHECKING:
    from .packed_weights import PackedWeights
    from .program import Program


def put_in(model: Any, packed: PackedWeights | None = None) -> list[Program]:
    """Replace what there are kernels for, in an ``openvino.Model`` of fixed shapes that will be compiled for bf16.

    Parameters
    ----------
    model
        Changed in place.
    packed
        The weights of earlier models of the same graph, to which this one's are added.

    Returns
    -------
    list[Program]
        Of the kernels that are now in the graph; none where they were not compiled, or the CPU has no AMX.

    """
    attention.put_in(model)
    group_norm.put_in(model)
    if not _is_quantized(model):
        # Between products of OpenVINO's each would be a program, and the call takes longer than it gains.
        layer_norm.put_in(model)
        product.put_in(model, packed)
    connect(model)
    return contract(model)


def _is_quantized(model: Any) -> bool:
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
