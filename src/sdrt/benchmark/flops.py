"""How many floating-point operations a graph takes, by its matrix multiplications and convolutions."""

from __future__ import annotations

import ast
import math
import operator
from typing import TYPE_CHECKING, Any, Final

from ..errors import BackendError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_OPERATORS: Final[Mapping[type[ast.operator], Callable[[int, int], int]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}

#: They change no shape, and those who put them into a graph write none down.
_ROUNDING: Final = {"QuantizeLinear", "DequantizeLinear"}


def graph_flops(graph: Path, sizes: Mapping[str, int]) -> int:
    """Count two operations for each multiplication and addition of MatMul, Gemm and Conv; all else is little.

    Parameters
    ----------
    graph
        An ONNX graph whose values' shapes are written down, as those of a bundle are, and whose attention is spelled
        out.
    sizes
        Of the dimensions that have names, such as ``batch``.

    Raises
    ------
    MissingDependencyError
        onnx is not installed.
    BackendError
        The graph does not tell the shape of something that is multiplied.

    """
    try:
        import onnx  # noqa: PLC0415 - those who only run bundles may be without it
    except ImportError:
        raise MissingDependencyError("onnx", "counting the operations of a graph", "export") from None
    inner = onnx.load(graph, load_external_data=False).graph
    values = {value.name: value for value in (*inner.value_info, *inner.input, *inner.output)}
    constants = {constant.name: tuple(constant.dims) for constant in inner.initializer}
    rounded = {node.output[0]: node.input[0] for node in inner.node if node.op_type in _ROUNDING}

    def shape(name: str) -> tuple[int, ...]:
        if name in constants:
            return constants[name]
        if name in rounded and name not in values:
            return shape(rounded[name])
        try:
            return tuple(_size(dim, sizes) for dim in values[name].type.tensor_type.shape.dim)
        except (KeyError, SyntaxError) as error:
            raise BackendError(
                f"{graph} does not tell the shape of {name} ({error}): expected a graph that sdrt build has made"
            ) from None

    count = 0
    for node in inner.node:
        if node.op_type == "Conv":  # each output is a sum over a window and its input channels
            summed = math.prod(shape(node.input[1])[1:])
        elif node.op_type == "Gemm":
            turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            summed = shape(node.input[0])[0 if turned else 1]
        elif node.op_type == "MatMul":
            summed = shape(node.input[0])[-1]
        else:
            continue
        count += 2 * summed * math.prod(shape(node.output[0]))
    return count


def _size(dim: Any, sizes: Mapping[str, int]) -> int:
    """Give a dimension's size, which may be written as arithmetic over named ones."""
    return (
        int(dim.dim_value) if dim.HasField("dim_value") else _value(ast.parse(dim.dim_param, mode="eval").body, sizes)
    )


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    raise KeyError(ast.unparse(node))
