"""Programs of kernels: operations of ours that follow upon each other in a graph become one, which is a single call.

A call of Python's for each operation takes as long as the smaller kernels themselves, for what it needs has gone from
the caches every time. In a U-Net all between the first convolution and the last are one program.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .kernels import Call, kernels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_OURS = "Sdrt"
_KERNELS = ("copy", "attention", "group_norm", "layer_norm", "product")
_OPERANDS = 5
_NUMBERS = 9
STEP = np.dtype([("kernel", "i8"), ("operands", "i8", _OPERANDS), ("numbers", "i8", _NUMBERS), ("value", "f8")])
"""``step_t`` of ``program.c``."""
_ALIGNED = 64
_HALF_BYTES = 2


def contract(model: Any) -> list[Program]:
    """Make programs of a graph's operations of ours, in an ``openvino.Model`` that is changed in place.

    What is in one needs nothing that is computed from another operation of it by OpenVINO in between.
    """
    stages = _stages(model.get_ordered_ops())
    programs = []
    for stage in sorted(set(stages.values())):
        nodes = [node for node in model.get_ordered_ops() if stages.get(node.friendly_name) == stage]
        writer = _Writer(nodes)
        program = writer.write()
        operation = _operation()(writer.inputs, program)
        for index, output in enumerate(writer.outputs):
            output.replace(operation.output(index))
        programs.append(program)
    model.validate_nodes_and_infer_types()
    return programs


def _stages(nodes: Sequence[Any]) -> dict[str, int]:
    """Give what can be in programs a number, by its friendly name: what has the same number can be in the same."""
    found: dict[str, int] = {}
    latest: dict[str, int] = {}
    for node in nodes:
        before = [place.get_source_output().get_node().friendly_name for place in node.inputs()]
        reached = max((latest[name] for name in before), default=-1)
        if _can_be_in(node):
            needed = (found[name] if name in found else latest[name] + 1 for name in before)
            found[node.friendly_name] = reached = max(reached, *needed)
        latest[node.friendly_name] = reached
    return found


def _can_be_in(node: Any) -> bool:
    kind = node.get_type_name()
    # Besides operations of ours, what `.channels_last` puts between them.
    return bool(
        kind.startswith(_OURS) or (kind in {"Concat", "Reshape"} and node.get_element_type().to_string() == "bf16")
    )


class Program:
    """Kernels in their order, and where what they read and write lies.

    Parameters
    ----------
    steps
        Of `STEP`.
    arena_bytes
        How much memory there has to be between the kernels.
    results
        The shape and the type of each output.
    constants
        Nodes of a graph, whose numbers are read.

    """

    def __init__(
        self, steps: NDArray[Any], arena_bytes: int, results: list[tuple[list[int], Any]], constants: list[Any]
    ) -> None:
        self.results = results
        self._steps, self._arena_bytes = steps, arena_bytes
        self._constants = [(node, node.data) for node in constants]  # as long as they are pointed to
        self._arenas: list[NDArray[Any]] = []

    def run(self, inputs: Sequence[int], outputs: Sequence[int]) -> bool:
        """Run it with the addresses of inputs and outputs; False for want of memory."""
        found = kernels()
        assert found is not None
        others = np.array([*inputs, *outputs, *(numbers.ctypes.data for _, numbers in self._constants)], np.uint64)
        try:
            arena = self._arenas.pop()  # of an earlier call; each that is under way has its own
        except IndexError:
            arena = aligned(self._arena_bytes)
        done = found.run(
            self._steps.ctypes.data, len(self._steps), arena.ctypes.data, others.ctypes.data, found.threads
        )
        self._arenas.append(arena)
        return done == 0

    def trim(self) -> None:
        """Free the memory between the kernels."""
        self._arenas.clear()


def aligned(nbytes: int) -> NDArray[Any]:
    """Make an array of bytes that begins at a cache line: across two of them a tile takes twice as long to load."""
    whole = np.empty(nbytes + _ALIGNED, np.uint8)
    begin = -whole.ctypes.data % _ALIGNED
    return whole[begin : begin + nbytes]


class _Value(NamedTuple):
    """An array: one of the others by its index, or in the arena, at an offset."""

    other: int | None
    offset: int = 0

    @property
    def operand(self) -> int:
        return 2 * self.offset if self.other is None else 2 * self.other + 1


class _Arena:
    """Offsets of arrays that do not live at the same time."""

    def __init__(self) -> None:
        self.size = 0
        self._used: list[tuple[int, int]] = []

    def take(self, nbytes: int) -> int:
        nbytes = -(-nbytes // _ALIGNED) * _ALIGNED
        offset = 0
        for begin, end in sorted(self._used):
            if begin - offset >= nbytes:
                break
            offset = max(offset, end)
        self._used.append((offset, offset + nbytes))
        self.size = max(self.size, offset + nbytes)
        return offset

    def give_back(self, offset: int) -> None:
        self._used = [(begin, end) for begin, end in self._used if begin != offset]


class _Writer:
    """Writes a program for nodes in their order.

    Attributes
    ----------
    inputs, outputs
        Outputs of nodes: what the program reads, and what it takes the place of.

    """

    def __init__(self, nodes: Sequence[Any]) -> None:
        self._nodes = nodes
        self._inside = {node.friendly_name for node in nodes}
        self._values: dict[str, _Value] = {}
        self._arena = _Arena()
        self._steps: list[tuple[int, list[int], list[int], float]] = []
        self._same: dict[str, str] = {}  # what is only reshaped, and of which array
        self._reads: dict[str, int] = {}  # of an array, as many as are still to come
        self.outputs = [node.output(0) for node in nodes if self._is_needed_outside(node)]
        read = [source for node in nodes for source in self._sources(node)]
        outside = {_key(source): source for source in read if source.get_node().friendly_name not in self._inside}
        is_constant = {key: source.get_node().get_type_name() == "Constant" for key, source in outside.items()}
        self.inputs = [source for key, source in outside.items() if not is_constant[key]]
        self._constants = [source for key, source in outside.items() if is_constant[key]]

    def write(self) -> Program:
        for index, output in enumerate([*self.inputs, *self.outputs, *self._constants]):
            self._values[_key(output)] = _Value(index)
        self._count_reads()
        for node in self._nodes:
            self._write_node(node)
        steps = np.zeros(len(self._steps), STEP)
        for step, (kernel, operands, numbers, value) in zip(steps, self._steps, strict=True):
            step["kernel"], step["value"] = kernel, value
            step["operands"] = operands + [-1] * (_OPERANDS - len(operands))
            step["numbers"] = numbers + [0] * (_NUMBERS - len(numbers))
        results = [(list(output.shape), output.element_type) for output in self.outputs]
        return Program(steps, self._arena.size, results, [source.get_node() for source in self._constants])

    def _sources(self, node: Any) -> list[Any]:
        places = node.inputs()[:1] if node.get_type_name() == "Reshape" else node.inputs()
        return [place.get_source_output() for place in places]

    def _is_needed_outside(self, node: Any) -> bool:
        return any(target.get_node().friendly_name not in self._inside for target in node.output(0).get_target_inputs())

    def _count_reads(self) -> None:
        for node in self._nodes:
            key, sources = _key(node.output(0)), [_key(source) for source in self._sources(node)]
            if node.get_type_name() == "Reshape" and key not in self._values:
                self._same[key] = self._same.get(sources[0], sources[0])
                continue
            for source in sources:
                array = self._same.get(source, source)
                self._reads[array] = self._reads.get(array, 0) + 1

    def _value(self, source: Any) -> _Value:
        key = _key(source)
        return self._values[self._same.get(key, key)]

    def _write_node(self, node: Any) -> None:
        key = _key(node.output(0))
        if key in self._same:
            return
        if key not in self._values:
            nbytes = math.prod(node.get_output_shape(0)) * _HALF_BYTES
            self._values[key] = _Value(None, self._arena.take(nbytes))
        result = self._values[key]
        sources = self._sources(node)
        if node.get_type_name().startswith(_OURS):
            call: Call = node.call([list(source.shape) for source in sources])
            operands = [self._value(source).operand for source in sources]
            if call.kernel == "product" and len(operands) == 3:
                operands.append(-1)  # no residual
            self._add(call, [*operands, result.operand])
        else:
            self._copy(node, sources, result)
        for source in sources:
            self._read(source)

    def _copy(self, node: Any, sources: list[Any], result: _Value) -> None:
        shape = list(node.get_output_shape(0))
        axis = node.get_attributes()["axis"] % len(shape) if node.get_type_name() == "Concat" else 0
        rows, apart = math.prod(shape[:axis]), math.prod(shape[axis:]) * _HALF_BYTES
        first = 0
        for source in sources:
            nbytes = math.prod(list(source.shape)[axis:]) * _HALF_BYTES
            self._add(Call("copy", (rows, nbytes, apart, first)), [self._value(source).operand, result.operand])
            first += nbytes

    def _add(self, call: Call, operands: list[int]) -> None:
        self._steps.append((_KERNELS.index(call.kernel), operands, [int(each) for each in call.numbers], call.value))

    def _read(self, source: Any) -> None:
        key = self._same.get(_key(source), _key(source))
        self._reads[key] -= 1
        value = self._values[key]
        if self._reads[key] == 0 and value.other is None:
            self._arena.give_back(value.offset)


def _key(output: Any) -> str:
    return f"{output.get_node().friendly_name}:{output.get_index()}"


@functools.cache
def _operation() -> Any:
    from openvino import Op, PartialShape  # noqa: PLC0415 - imported already, by whoever made the model

    class SdrtProgram(Op):  # type: ignore[misc]
        def __init__(self, inputs: Any, program: Program) -> None:
            self.program = program
            super().__init__(self, inputs)

        def validate_and_infer_types(self) -> None:
            self.set_output_size(len(self.program.results))
            for index, (shape, kind) in enumerate(self.program.results):
                self.set_output_type(index, kind, PartialShape(shape))

        def clone_with_new_inputs(self, inputs: Any) -> Any:
            return type(self)(inputs, self.program)

        def visit_attributes(self, _visitor: Any) -> bool:
            return True

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            # Other threads of Python's go on meanwhile.
            addresses = [[tensor.data.ctypes.data for tensor in tensors] for tensors in (inputs, outputs)]
            return bool(self.program.run(*addresses))

    return SdrtProgram
