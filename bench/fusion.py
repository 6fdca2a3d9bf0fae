"""What makes the engines better: the precision around normalisations, fixed shapes, the optimisation level.

``python -m bench.fusion ONNX_BUNDLE [--size 512x512] [--target rtx3090] [--components unet vae_decoder] [--json FILE]``
edits the graphs of an fp16 bundle, builds an engine of each with TensorRT-RTX, and compares the engines' own lists of
layers: how many kernels, how many of them only move data, the bytes of activations that all of them read and write,
and what is fused. Nothing runs, and no GPU is needed. Random weights will do, as for ``bench.engines``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.engines import layer_counts, parse_size
from sdrt.engines.bundle import Bundle
from sdrt.engines.profiles import profiles_of
from sdrt.engines.table import columns
from sdrt.engines.targets import capability_of
from sdrt.engines.tensorrt import Builder, Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import onnx

Graph = Literal["as exported", "SiLU in float16", "GroupNorm and SiLU in float16", "all normalisations in float16"]
_GROUP_NORM, _LAYER_NORM = "InstanceNormalization", "LayerNormalization"


@dataclass(frozen=True)
class Trial:
    """One engine to build.

    Attributes
    ----------
    component
        ``unet`` or ``vae_decoder``.
    graph
        How the graph is edited.
    dynamic
        Whether its profile spans from the size to one and a half times the size, rather than fixing it.
    level
        The optimisation level; None for the builder's default.

    """

    component: str
    graph: Graph = "as exported"
    dynamic: bool = False
    level: int | None = None


def trials(component: str) -> Iterator[Trial]:
    """List what is tried: one thing changed at a time."""
    yield Trial(component)
    yield Trial(component, "SiLU in float16")
    yield Trial(component, "GroupNorm and SiLU in float16")
    if component == "unet":
        yield Trial(component, "all normalisations in float16")
    yield Trial(component, dynamic=True)
    for level in (0, 1, 5):
        yield Trial(component, level=level)


class _Editor:
    """A graph whose normalisations stand between casts to float32 and back, as sdrt exports them: a SiLU within."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.nodes = list(model.graph.node)
        self.weights = {weight.name: weight for weight in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self._index()

    def _index(self) -> None:
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for tensor in node.input:
                self.consumers.setdefault(tensor, []).append(node)

    def narrow(self, anchor: str) -> int:
        """Compute normalisations of one operator in float16, without the casts around them; gives how many."""
        count = 0
        for cast in [node for node in self.nodes if _casts(node) == "FLOAT"]:
            region, casts_back = self._region(cast)
            if not any(node.op_type == anchor for node in region) or not casts_back:
                continue
            for node in region:
                for position, tensor in enumerate(node.input):
                    if tensor == cast.output[0]:
                        node.input[position] = cast.input[0]
                    elif tensor in self.weights and self.weights[tensor].data_type == _type("FLOAT"):
                        node.input[position] = self._half(tensor)
            for back in casts_back:
                self._rename(back.output[0], back.input[0])
            self._remove(cast, *casts_back)
            count += 1
        return count

    def narrow_silu(self) -> int:
        """Let each SiLU after a normalisation work in float16: the cast back stands before it; gives how many."""
        from onnx import helper  # noqa: PLC0415

        producers = {tensor: node for node in self.nodes for tensor in node.output}
        count = 0
        for back in [node for node in self.nodes if _casts(node) == "FLOAT16"]:
            product = producers.get(back.input[0])
            if product is None or product.op_type != "Mul":
                continue
            gates = [producers[tensor] for tensor in product.input if tensor in producers]
            gate = next((node for node in gates if node.op_type == "Sigmoid"), None)
            if gate is None:
                continue
            wide = gate.input[0]
            narrow = f"{wide}_narrow"
            cast = helper.make_node("Cast", [wide], [narrow], f"cast_{narrow}", to=_type("FLOAT16"))
            self.nodes.insert(self.nodes.index(gate), cast)
            for node in (gate, product):
                node.input[list(node.input).index(wide)] = narrow
            product.output[0] = back.output[0]
            self._remove(back)
            count += 1
        return count

    def save(self, path: Path) -> None:
        """Write the graph alone, without the weights that stand outside it."""
        import onnx  # noqa: PLC0415

        graph = self.model.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        used = {tensor for node in self.nodes for tensor in node.input}
        graph.initializer.extend(weight for name, weight in self.weights.items() if name in used)
        onnx.save(self.model, path)

    def _region(self, cast: onnx.NodeProto) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
        """Follow a cast to float32: what computes in it, and the casts back; nothing if it goes elsewhere too."""
        region: list[onnx.NodeProto] = []
        back: list[onnx.NodeProto] = []
        queue = [cast.output[0]]
        while queue:
            tensor = queue.pop()
            if tensor in self.outputs:
                return [], []
            for node in self.consumers.get(tensor, []):
                if _casts(node) == "FLOAT16":
                    back.append(node)
                elif node.op_type not in {"Reshape", "Shape", "Mul", "Add", "Sigmoid", _GROUP_NORM, _LAYER_NORM}:
                    return [], []
                elif all(node is not other for other in region):
                    region.append(node)
                    queue += [] if node.op_type == "Shape" else node.output
        return region, back

    def _half(self, name: str) -> str:
        import numpy as np  # noqa: PLC0415
        from onnx import numpy_helper  # noqa: PLC0415

        half = f"{name}_half"
        if half not in self.weights:
            values = numpy_helper.to_array(self.weights[name], str(self.folder)).astype(np.float16)
            self.weights[half] = numpy_helper.from_array(values, half)
        return half

    def _rename(self, old: str, new: str) -> None:
        for node in self.consumers.pop(old, []):
            for position, tensor in enumerate(node.input):
                if tensor == old:
                    node.input[position] = new
            self.consumers.setdefault(new, []).append(node)

    def _remove(self, *gone: onnx.NodeProto) -> None:
        self.nodes = [node for node in self.nodes if all(node is not other for other in gone)]
        self._index()


def _type(name: str) -> int:
    from onnx import TensorProto  # noqa: PLC0415

    return int(TensorProto.DataType.Value(name))


def _casts(node: onnx.NodeProto) -> str | None:
    """Tell what a node casts to; None for one that is no cast."""
    from onnx import TensorProto  # noqa: PLC0415

    if node.op_type != "Cast":
        return None
    return str(TensorProto.DataType.Name(next(attribute.i for attribute in node.attribute if attribute.name == "to")))


_EDITS: dict[Graph, Callable[[_Editor], int]] = {
    "as exported": lambda _editor: 1,
    "SiLU in float16": _Editor.narrow_silu,
    "GroupNorm and SiLU in float16": lambda editor: editor.narrow(_GROUP_NORM),
    "all normalisations in float16": lambda editor: editor.narrow(_GROUP_NORM) and editor.narrow(_LAYER_NORM),
}


def edit(source: Path, graph: Graph, target: Path) -> None:
    """Write an edited copy of a graph.

    Parameters
    ----------
    source
        The ``.onnx`` file, its weights beside it.
    graph
        What to change.
    target
        The file to write, which needs the file of weights beside it as the source does.

    Raises
    ------
    ValueError
        The graph has nothing to change.

    """
    import onnx  # noqa: PLC0415

    editor = _Editor(onnx.load(source, load_external_data=False), source.parent)
    if not _EDITS[graph](editor):
        raise ValueError(f"{source} has nothing that {graph!r} would change")
    editor.save(target)


def measure(source: Path, trial: Trial, size: tuple[int, int], target: str) -> dict[str, Any]:
    """Build one engine and count its layers."""
    bundle = Bundle.open(source)
    part, factor = bundle.component(trial.component), bundle.manifest.latent.scale_factor
    larger = tuple(math.ceil(side * 1.5 / 64) * 64 for side in size)
    sizes = [size, (larger[0], larger[1])] if trial.dynamic else [size]
    # The first profile of the U-Net is the one with guidance.
    profile = profiles_of(part, sizes, [1], factor, dynamic=trial.dynamic)[:1]
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / part.graph.path
        edit(bundle.path(part.graph), trial.graph, graph)
        data = bundle.path(part.files[1])
        (graph.parent / data.name).symlink_to(data)
        builder = Builder("tensorrt-rtx", [capability_of(target)], Options(trial.level))
        cpu = time.process_time()
        plan = builder.build(graph, Path(folder), trial.component, profile)
        seconds = time.process_time() - cpu
    facts = {
        "cpu_seconds": round(seconds, 1),
        "plan_bytes": plan.file.bytes,
        "plan_sha256": plan.file.sha256,
        "backend": f"tensorrt-rtx {builder.version}",
    }
    return dataclasses.asdict(trial) | layer_counts(plan.fusion, 0) | facts


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out what was measured."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["fused"]))
    heads = ("COMPONENT", "GRAPH", "SHAPES", "LEVEL", "LAYERS", "COPIES", "TRAFFIC", "PLAN", "CPU S")
    cells = [(*heads, *map(str.upper, kinds))]
    cells += [
        (
            row["component"],
            row["graph"],
            "dynamic" if row["dynamic"] else "fixed",
            "default" if row["level"] is None else str(row["level"]),
            str(row["layers"]),
            str(row["copies"]),
            # A dimension that is chosen at run time has no size that could be counted.
            "" if row["dynamic"] else f"{row['traffic_bytes'] / 1e6:.0f} MB",
            f"{row['plan_bytes'] / 1e6:.0f} MB",
            f"{row['cpu_seconds']:.0f}",
            *(row["fused"].get(kind, "") for kind in kinds),
        )
        for row in rows
    ]
    return columns(cells)


def main() -> None:
    """Try everything, and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.fusion", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path, metavar="ONNX_BUNDLE")
    parser.add_argument("--size", type=parse_size, default=(512, 512))
    parser.add_argument("--target", default="rtx3090")
    parser.add_argument("--components", nargs="+", choices=["unet", "vae_decoder"], default=["unet", "vae_decoder"])
    parser.add_argument("--json", type=Path, help="write there too")
    given = parser.parse_args()
    rows = []
    for trial in (trial for component in given.components for trial in trials(component)):
        # A process of its own, which gives its memory back.
        with get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (given.source.resolve(), trial, given.size, given.target)))
        print(json.dumps(rows[-1]), flush=True)
    print(f"\n{table(rows)}")
    if given.json is not None:
        size = "x".join(map(str, given.size))
        what = (
            f"Engines for one guided image at {size}, built and not run; traffic_bytes: activations read and written."
        )
        facts = {"what": what, "target": given.target, "rows": rows}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
