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

CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
"""Orders of axes, from an array of [batch, channels, height, width] and back."""

_INT64, _FLOAT, _INT = ctypes.c_int64, ctypes.c_float, ctypes.c_int


class Kernels(NamedTuple):
    """Compiled functions, and how many threads they are to use.

    They return 0, or -1 for want of memory. Arrays are given by their addresses, and are of bf16 but for scale, shift
    and bias, which are float32.

    ``attention``: q, k, v and the output; batch, queries, keys, heads, numbers in a head; scale, threads.
    ``group_norm``: input, scale, shift, output; rows, pixels, channels, groups; epsilon, whether with SiLU, threads.
    ``layer_norm``: input, scale, shift, output; rows, channels; epsilon, threads.
    ``product``: input, packed weights, bias, residual or None, output; batch, height, width, channels, outputs, side
    of the offsets, how to resize, rows of the bias; whether gated, threads.
    ``pack``: weights in float32, where to; channels, outputs, offsets; how far apart outputs, channels and offsets are;
    the first column, and the columns from one to the next; threads.
    ``run``: `STEP`s, their count, arena, other addresses, threads.
    """

    attention: Callable[..., int]
    group_norm: Callable[..., int]
    layer_norm: Callable[..., int]
    product: Callable[..., int]
    pack: Callable[..., int]
    run: Callable[..., int]
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
    pointers = [ctypes.c_void_p]
    signatures = {
        "attention": [*pointers * 4, *[_INT64] * 5, _FLOAT, _INT],
        "group_norm": [*pointers * 4, *[_INT64] * 4, _FLOAT, _INT, _INT],
        "layer_norm": [*pointers * 4, *[_INT64] * 2, _FLOAT, _INT],
        "product": [*pointers * 5, *[_INT64] * 8, _INT, _INT],
        "pack": [*pointers * 2, *[_INT64] * 8, _INT],
        "run": [*pointers, _INT64, *pointers * 2, _INT],
    }
    for name, arguments in signatures.items():
        getattr(library, f"sdrt_{name}").argtypes = arguments
    functions = {name: getattr(library, f"sdrt_{name}") for name in signatures}
    return Kernels(threads=len(os.sched_getaffinity(0)), **functions)


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


class Call(NamedTuple):
    """What a kernel is called with besides arrays: its name, numbers, and the one number that is no integer."""

    kernel: str
    numbers: tuple[int, ...]
    value: float = 0.0


@functools.cache
def operation_class() -> Any:
    """Give the class of operations that stand for the call of a kernel, for which OpenVINO has to be there.

    Its classes are made of their inputs and of numbers, `settings`. Their output has the first input's type and shape
    unless they say otherwise; ``call`` gives the `Call` for the shapes of the inputs. A graph cannot be run before
    `.program.contract` has made programs of them.
    """
    from openvino import Op  # noqa: PLC0415 - imported already, by whoever made the model

    class KernelOperation(Op):  # type: ignore[misc]
        def __init__(self, inputs: Any = None, *settings: float) -> None:
            self.settings = settings  # which its shape may depend on
            super().__init__(self, inputs)

        def validate_and_infer_types(self) -> None:
            self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

        def clone_with_new_inputs(self, inputs: Any) -> Any:
            return type(self)(inputs, *self.settings)

        def visit_attributes(self, visitor: Any) -> bool:
            visitor.on_attributes({f"setting_{index}": value for index, value in enumerate(self.settings)})
            return True

    return KernelOperation


def given(node: Any, index: int, kind: str) -> Any:
    """Give the node of a graph that an input comes from, past conversions, which there are in fp16.

    Raises
    ------
    OtherGraphError
        It is of another kind.

    """
    found = node.input_value(index).get_node()
    while rounds(found):
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
    if rounds(found):
        return taken(found, kind)
    if found.get_type_name() != kind:
        raise OtherGraphError
    return found


def rounds(node: Any) -> bool:
    """Tell whether a node does nothing but change the precision of floating-point numbers."""
    if node.get_type_name() != "Convert":
        return False
    kinds = {output.element_type.to_string() for output in (node.input_value(0), node.output(0))}
    return kinds <= {"f32", "f16", "bf16"}


def is_float(*outputs: Any) -> bool:
    """Tell whether outputs of nodes are of the types that are taken for bf16 where that is computed in."""
    return all(output.element_type.to_string() in {"f32", "f16"} for output in outputs)
