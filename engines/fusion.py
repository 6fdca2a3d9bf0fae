"""What became of a network in an engine: its layers, and which attention, GEGLU and normalisation run as one kernel.

TensorRT tells both in its build log alone: what it parses ("Parsing node" and the tensors of each node) and, with
detailed profiling verbosity, the layers of the engine with the ONNX nodes that each one stands for. No GPU is needed
to see them, so a change in the export that loses a fusion is seen on any machine.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict, deque
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import BundleCorruptError
from .bundle import layers_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from .bundle import Bundle

PatternKind = Literal["attention", "geglu", "group_norm", "silu", "layer_norm"]

_NODE = re.compile(r"(?P<name>\S+) \[(?P<op>\w+)\] (?P<side>inputs|outputs): (?P<tensors>.*)")
_NODE_TENSOR = re.compile(r"\[(?P<name>\S+) -> \(")
_TENSORS = r"\[(?P<{}>(?: ?\{{[^}}]*\}},?)* ?)\]"
_LAYER = re.compile(
    "Name: (?P<name>.+?), LayerType: (?P<kind>[^,]*), "
    f"Inputs: {_TENSORS.format('inputs')}, (Constants: {_TENSORS.format('constants')}, )?"
    f"Outputs: {_TENSORS.format('outputs')}(?P<rest>.*)"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<dimensions>[0-9,-]*)\].*?Datatype: (?P<dtype>\w+)")
_ONNX = re.compile(r"\[ONNX Layer: (?P<node>[^\]]+)\]")
_PROFILE = re.compile(r"_myl(?P<profile>[0-9]+)_[0-9]+$")
_PROFILE_MARK = re.compile(r"\[profile (?P<profile>[0-9]+)\]")
_BYTES = {"Double": 8, "Int64": 8, "Float": 4, "Int32": 4, "Half": 2, "BFloat16": 2, "FP8": 1, "Int8": 1, "Bool": 1}
# Myelin names its generated kernels after their operations, four letters each; these move data and compute nothing.
_MOVES = re.compile(r"__myl_(Move|Resh|Tran|Conc|Slic|Cast|Pad|Gath|Bcst|Repl)+(_|$)")
# By the operator that gives a pattern away: the nearest operators before it and after it, one after the other.
_PATTERNS: Mapping[str, tuple[PatternKind, Sequence[str], Sequence[str]]] = {
    "Softmax": ("attention", ("MatMul",), ("MatMul",)),
    "Gelu": ("geglu", ("MatMul",), ("Mul",)),
    "InstanceNormalization": ("group_norm", (), ("Mul", "Add")),
    "GroupNormalization": ("group_norm", (), ()),
    "LayerNormalization": ("layer_norm", (), ()),
    "Sigmoid": ("silu", (), ("Mul",)),
}
# What a SiLU can ride on.
_CARRIERS = {"InstanceNormalization", "GroupNormalization", "LayerNormalization", "Conv", "MatMul", "Gemm"}


@dataclass(frozen=True)
class Tensor:
    """What a layer reads or writes: TensorRT's name of the type, such as ``Half``, and the shape (-1: chosen later)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size; dimensions that are chosen at run time count as 1."""
        return _BYTES.get(self.dtype, 1) * math.prod(max(1, size) for size in self.shape)

    def __str__(self) -> str:
        return f"{self.dtype.lower()} {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Layer:
    """One kernel of an engine.

    Attributes
    ----------
    name, kind
        TensorRT's.
    profile
        The optimisation profile that it belongs to.
    nodes
        The ONNX nodes that it stands for, or takes part in.
    inputs, outputs
        Activations; constants are left out.

    """

    name: str
    kind: str
    profile: int
    nodes: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def traffic(self) -> int:
        """Bytes of activations read and written."""
        return sum(tensor.bytes for tensor in (*self.inputs, *self.outputs))

    @property
    def moves_only(self) -> bool:
        """Whether it copies, casts or reorders and computes nothing."""
        return _MOVES.match(self.name) is not None


@dataclass(frozen=True)
class Pattern:
    """A part of the network that should run as one kernel, in one optimisation profile.

    Attributes
    ----------
    kind
        ``attention`` (scores, softmax, weighted sum), ``geglu`` (projection, GELU, product), ``group_norm``, ``silu``
        (any product with a sigmoid) or ``layer_norm``.
    where
        The first named weight after it, which tells its place in the network.
    profile
        The optimisation profile.
    fused
        Whether one layer does it all; for ``geglu``, whether its matrix multiplications do it all; for ``silu``,
        whether it rides on the normalisation or multiplication before it.
    layers
        The names of the layers that take part in it.

    """

    kind: PatternKind
    where: str
    profile: int
    fused: bool
    layers: tuple[str, ...]


@dataclass(frozen=True)
class FusionReport:
    """All layers of an engine in their order, and all patterns of its network."""

    layers: tuple[Layer, ...]
    patterns: tuple[Pattern, ...]

    @property
    def profiles(self) -> tuple[int, ...]:
        """The optimisation profiles that have layers."""
        return tuple(sorted({layer.profile for layer in self.layers}))

    def count(self, kind: PatternKind, profile: int) -> tuple[int, int]:
        """Tell how many patterns of a kind are fused in a profile, and how many there are."""
        found = [pattern.fused for pattern in self.patterns if (pattern.kind, pattern.profile) == (kind, profile)]
        return sum(found), len(found)

    def to_json(self) -> str:
        """Write the file that a bundle keeps."""
        document = {
            "patterns": [asdict(pattern) for pattern in self.patterns],
            "layers": [
                asdict(layer) | {"inputs": list(map(str, layer.inputs)), "outputs": list(map(str, layer.outputs))}
                for layer in self.layers
            ],
        }
        lines = ",\n".join(
            f"{json.dumps(key)}: [\n" + ",\n".join(map(json.dumps, items)) + "\n]" for key, items in document.items()
        )
        return f"{{\n{lines}\n}}\n"


@dataclass
class _Node:
    name: str
    op: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


class BuildLog:
    """Collects from TensorRT's messages what a `FusionReport` needs, one message after the other."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Node] = {}
        self._layers: list[Layer] = []

    def feed(self, message: str) -> None:
        """Read one message of verbose severity."""
        if message.startswith("Layers:"):
            # The engine is listed once, in one message.
            self._layers = [layer for line in message.splitlines() if (layer := _layer(line))]
        elif match := _NODE.fullmatch(message.strip()):
            node = self._nodes.setdefault(match["name"], _Node(match["name"], match["op"]))
            tensors = [tensor["name"] for tensor in _NODE_TENSOR.finditer(match["tensors"])]
            (node.inputs if match["side"] == "inputs" else node.outputs).extend(tensors)

    def report(self) -> FusionReport:
        """Match the network's patterns with the engine's layers."""
        graph = _Graph(self._nodes.values())
        profiles = sorted({layer.profile for layer in self._layers})
        holders: dict[tuple[int, str], list[Layer]] = defaultdict(list)
        for layer in self._layers:
            for node in layer.nodes:
                holders[layer.profile, node].append(layer)
        patterns = [
            graph.match(kind, core, profile, [holders[profile, node.name] for node in core])
            for kind, core in graph.patterns()
            for profile in profiles
        ]
        return FusionReport(tuple(self._layers), tuple(patterns))


def _layer(line: str) -> Layer | None:
    match = _LAYER.match(line)
    if not match:
        return None
    marks = _PROFILE.search(match["name"]) or _PROFILE_MARK.search(line)
    inputs, outputs = (tuple(map(_tensor, _TENSOR.finditer(match[side]))) for side in ("inputs", "outputs"))
    nodes = tuple(found["node"] for found in _ONNX.finditer(match["rest"]))
    return Layer(match["name"], match["kind"], int(marks["profile"]) if marks else 0, nodes, inputs, outputs)


def _tensor(match: re.Match[str]) -> Tensor:
    return Tensor(match["dtype"], tuple(int(size) for size in match["dimensions"].split(",") if size))


class _Graph:
    """The ONNX graph as the parser saw it."""

    def __init__(self, nodes: Iterable[_Node]) -> None:
        self.nodes = list(nodes)
        self.ops = {node.name: node.op for node in self.nodes}
        self.producer = {tensor: node for node in self.nodes for tensor in node.outputs}
        self.consumers: dict[str, list[_Node]] = defaultdict(list)
        for node in self.nodes:
            for tensor in node.inputs:
                self.consumers[tensor].append(node)

    def patterns(self) -> Iterator[tuple[PatternKind, tuple[_Node, ...]]]:
        """Find each pattern's nodes, in the graph's order."""
        for node in self.nodes:
            if node.op in _PATTERNS:
                kind, before, after = _PATTERNS[node.op]
                core = [self._before(node, op) for op in before] + [node]
                for op in after:
                    core.append(self._after(core[-1], op) if core[-1] else None)
                whole = tuple(found for found in core if found)
                if len(whole) == len(core):
                    yield kind, whole

    def match(
        self, kind: PatternKind, core: Sequence[_Node], profile: int, holders: Sequence[Sequence[Layer]]
    ) -> Pattern:
        """Tell what became of a pattern whose nodes are found in these layers."""
        # What has no input sets a counter to zero for the kernel that follows.
        parts = {layer.name: layer for holder in holders for layer in holder if layer.inputs}
        if kind == "geglu":
            # The two halves of the projection are two matrix multiplications; GELU and product ride on them.
            fused = bool(parts) and all(layer in holders[0] for layer in parts.values())
        else:
            fused = len(parts) == 1 and all(layer in holder for holder in holders for layer in parts.values())
        if kind == "silu":
            ops = {self.ops.get(node) for layer in parts.values() for node in layer.nodes}
            fused = fused and not ops.isdisjoint(_CARRIERS)
        return Pattern(kind, self.where(core[-1]), profile, fused, tuple(parts))

    def where(self, node: _Node) -> str:
        """Name the first weight after a node by its path in the module."""
        seen, queue = {node.name}, deque([node])
        while queue:
            here = queue.popleft()
            if here is not node:
                for tensor in here.inputs:
                    if "." in tensor and tensor not in self.producer:
                        return tensor.removeprefix("model.").rsplit(".", 1)[0]
            for tensor in here.outputs:
                for following in self.consumers[tensor]:
                    if following.name not in seen:
                        seen.add(following.name)
                        queue.append(following)
        return node.name

    def _before(self, node: _Node, op: str) -> _Node | None:
        return self._nearest(node, op, lambda here: [self.producer[t] for t in here.inputs if t in self.producer])

    def _after(self, node: _Node, op: str) -> _Node | None:
        return self._nearest(node, op, lambda here: [n for t in here.outputs for n in self.consumers[t]])

    @staticmethod
    def _nearest(node: _Node, op: str, neighbours: Any) -> _Node | None:
        # Six steps span a cast, a mask, a bias, a split and a reshape; what is further away belongs to something else.
        frontier = [node]
        for _ in range(6):
            frontier = [following for here in frontier for following in neighbours(here)]
            for found in frontier:
                if found.op == op:
                    return found
        return None


def load(bundle: Bundle, component: str) -> FusionReport | None:
    """Read a component's report from a bundle; None where it has none, as in an ONNX bundle.

    Raises
    ------
    BundleCorruptError
        The file is not as sdrt writes it.

    """
    for entry in bundle.component(component).files:
        if entry.path == layers_name(component):
            try:
                return _parse(json.loads(bundle.path(entry).read_bytes()))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise BundleCorruptError(f"{bundle.folder}: {entry.path} cannot be read: {error}") from None
    return None


def _parse(document: Any) -> FusionReport:
    layers = [
        Layer(
            _text(item["name"]),
            _text(item["kind"]),
            int(item["profile"]),
            tuple(map(_text, item["nodes"])),
            tuple(map(_parse_tensor, item["inputs"])),
            tuple(map(_parse_tensor, item["outputs"])),
        )
        for item in document["layers"]
    ]
    patterns = [
        Pattern(
            item["kind"] if item["kind"] in get_args(PatternKind) else _refuse(item["kind"]),
            _text(item["where"]),
            int(item["profile"]),
            bool(item["fused"]),
            tuple(map(_text, item["layers"])),
        )
        for item in document["patterns"]
    ]
    return FusionReport(tuple(layers), tuple(patterns))


def _parse_tensor(text: Any) -> Tensor:
    dtype, _, shape = _text(text).partition(" ")
    known = {name.lower(): name for name in _BYTES}
    return Tensor(known.get(dtype, dtype), tuple(int(size) for size in shape.split("x") if size))


def _text(value: Any) -> str:
    # Terminals obey control characters.
    return value if isinstance(value, str) and value.isprintable() else _refuse(value)


def _refuse(value: Any) -> Any:
    raise ValueError(f"{str(value)[:60]!r} is not what sdrt writes there")
