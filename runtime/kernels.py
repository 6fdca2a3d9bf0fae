"""Kernels in C for what OpenVINO is slow at in bf16, and how they come into its graphs.

They are compiled when sdrt is installed, where there is a C compiler, and run where the CPU has AMX. Elsewhere
OpenVINO's own remain.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

LIBRARY = Path(__file__).with_name("libsdrt_kernels.so.1")
"""What the installation compiles."""

_INT64, _FLOAT, _INT = ctypes.c_int64, ctypes.c_float, ctypes.c_int


class Kernels(NamedTuple):
    """Compiled functions, and how many threads they are to use.

    Both return 0, or -1 for want of memory. Arrays are given by their addresses, and are of bf16 but for scale and
    shift, which are float32.

    ``attention``: q, k, v and the output; batch, queries, keys, heads, numbers in a head; scale, threads.
    ``group_norm``: input, scale, shift, output; rows, pixels, channels, groups; epsilon, whether with SiLU, threads.
    """

    attention: Callable[..., int]
    group_norm: Callable[..., int]
    threads: int


class OtherGraphError(Exception):
    """Something is not as Stable Diffusion v1 is exported, and is left to OpenVINO."""


@functools.cache
def kernels() -> Kernels | None:
    """Load them: None where they were not compiled, and where CPU or system have no AMX."""
    if sys.platform != "linux" or not LIBRARY.exists():
        return None
    try:
        library = ctypes.CDLL(os.fspath(LIBRARY))
    except OSError:  # of another processor or another C library
        return None
    if library.sdrt_prepare():
        return None
    attention, group_norm = library.sdrt_attention, library.sdrt_group_norm
    attention.argtypes = [*[ctypes.c_void_p] * 4, *[_INT64] * 5, _FLOAT, _INT]
    group_norm.argtypes = [*[ctypes.c_void_p] * 4, *[_INT64] * 4, _FLOAT, _INT, _INT]
    return Kernels(attention, group_norm, len(os.sched_getaffinity(0)))


def replace_each(model: Any, kind: str, replace: Callable[[Any], None]) -> int:
    """Replace what nodes of one kind are part of, if there are `kernels` to replace it with.

    Parameters
    ----------
    model
        An ``openvino.Model`` of fixed shapes that will be compiled for bf16, changed in place.
    kind
        Of nodes, as OpenVINO calls it.
    replace
        Does it for one node, or raises OtherGraphError.

    Returns
    -------
    int
        How many were replaced.

    """
    if kernels() is None:
        return 0
    count = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == kind:
            with suppress(OtherGraphError):
                replace(node)
                count += 1
    return count


@functools.cache
def operation_class() -> Any:
    """Give the class of operations that call a kernel, for which OpenVINO has to be there.

    Its classes are made of their inputs and of numbers, `settings`. Their output has the first input's type and shape;
    ``compute`` gets the addresses of the inputs and of the output, and the shapes of the inputs.
    """
    from openvino import Op  # noqa: PLC0415 - imported already, by whoever made the model

    class KernelOperation(Op):  # type: ignore[misc]
        def __init__(self, inputs: Any = None, *settings: float) -> None:
            super().__init__(self, inputs)
            self.settings = settings

        def validate_and_infer_types(self) -> None:
            self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

        def clone_with_new_inputs(self, inputs: Any) -> Any:
            return type(self)(inputs, *self.settings)

        def visit_attributes(self, visitor: Any) -> bool:
            visitor.on_attributes({f"setting_{index}": value for index, value in enumerate(self.settings)})
            return True

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            addresses = [tensor.data.ctypes.data for tensor in (*inputs, outputs[0])]
            # Other threads of Python's go on meanwhile.
            return bool(self.compute(addresses, [tensor.shape for tensor in inputs]) == 0)

    return KernelOperation


def given(node: Any, index: int, kind: str) -> Any:
    """Give the node of a graph that an input comes from, past conversions, which there are in fp16.

    Raises
    ------
    OtherGraphError
        It is of another kind.

    """
    found = node.input_value(index).get_node()
    while found.get_type_name() == "Convert":
        found = found.input_value(0).get_node()
    if found.get_type_name() != kind:
        raise OtherGraphError
    return found


def taken(node: Any, kind: str) -> Any:
    """Give the only node that takes an output, as its first input, past conversions.

    Raises
    ------
    OtherGraphError
        It is of another kind, or there are more of them.

    """
    targets = list(node.output(0).get_target_inputs())
    if len(targets) != 1 or targets[0].get_index() != 0:
        raise OtherGraphError
    found = targets[0].get_node()
    if found.get_type_name() == "Convert":
        return taken(found, kind)
    if found.get_type_name() != kind:
        raise OtherGraphError
    return found


def is_float(*outputs: Any) -> bool:
    """Tell whether outputs of nodes are of the types that are taken for bf16 where that is computed in."""
    return all(output.element_type.to_string() in {"f32", "f16"} for output in outputs)
