"""What it takes to build TensorRT engines of the full-size model, and what became of the network in them.

``python -m bench.engines ONNX_BUNDLE [--backend tensorrt-rtx] [--target rtx3090] [--json FILE]`` builds engines of an
fp16 bundle in a process of its own and prints JSON: seconds, processor seconds, peak memory, bytes of each plan, and
the fusion table. A bundle with random weights will do: ``python -m bench.checkpoints OUT --size full --dtype float16``
and ``sdrt build --ckpt OUT --precision fp16``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import tempfile
import time
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

from sdrt.engines import fusion
from sdrt.engines.build import build_engines
from sdrt.engines.bundle import Bundle
from sdrt.engines.tensorrt import MODULES, Options


def measure(source: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Build in this process, which nothing else may have used, and tell what it took.

    Parameters
    ----------
    source
        An fp16 ONNX bundle.
    arguments
        Of `sdrt.engines.build.build_engines`.

    Returns
    -------
    dict
        ``seconds`` and ``cpu_seconds`` in all, ``stages``: seconds of each, ``peak_bytes``: the largest resident set,
        which counts the mapped weights too, and ``components``.

    """
    times: list[tuple[str, float]] = []

    def report(what: str, _done: int, _total: int) -> None:
        stage = what.split(":", maxsplit=1)[0]
        if not times or times[-1][0] != stage:
            times.append((stage, time.perf_counter()))

    start, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        bundle = build_engines(Bundle.open(source), output=Path(folder) / "engines", report=report, **arguments)
        end = time.perf_counter()
        return {
            "seconds": round(end - start, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "stages": {stage: round(after - at, 1) for (stage, at), (_, after) in pairwise([*times, ("", end)])},
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "backend": dataclasses.asdict(bundle.manifest.backend),
            "components": {
                component.name: {"plan_bytes": component.graph.bytes, "profiles": _profiles(bundle, component.name)}
                for component in bundle.manifest.components
            },
        }


def _profiles(bundle: Bundle, component: str) -> list[dict[str, Any]]:
    report = fusion.load(bundle, component)
    assert report is not None
    shapes = bundle.component(component).profiles
    return [
        {"shapes": {name: [each.min, each.opt, each.max] for name, each in shapes[index].items()}}
        | layer_counts(report, index)
        for index in report.profiles
    ]


def layer_counts(report: fusion.FusionReport, profile: int) -> dict[str, Any]:
    """Count the layers of one optimisation profile: all, those that only move data, their traffic, what is fused."""
    layers = [layer for layer in report.layers if layer.profile == profile]
    counts = {kind: report.count(kind, profile) for kind in get_args(fusion.PatternKind)}
    return {
        "layers": len(layers),
        "copies": sum(layer.moves_only for layer in layers),
        "traffic_bytes": sum(layer.traffic for layer in layers),
        "fused": {kind: f"{fused} of {total}" for kind, (fused, total) in counts.items() if total},
    }


def parse_size(text: str) -> tuple[int, int]:
    """Read a size such as 512x768."""
    width, _, height = text.partition("x")
    return int(width), int(height)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path, metavar="ONNX_BUNDLE")
    parser.add_argument("--backend", choices=MODULES, default="tensorrt-rtx")
    parser.add_argument("--target", action="append", dest="targets", help="[default: the backend's]")
    parser.add_argument(
        "--size", action="append", dest="sizes", type=parse_size, default=None, help="[default: 512x512]"
    )
    parser.add_argument("--images", action="append", type=int, default=None, help="[default: 1]")
    parser.add_argument("--dynamic", action="store_true")
    parser.add_argument("--optimization-level", type=int)
    parser.add_argument("--json", type=Path, help="write there too")
    given = vars(parser.parse_args())
    source, file = given.pop("source").resolve(), given.pop("json")
    arguments = {
        **given,
        "targets": given["targets"] or (),
        "sizes": given["sizes"] or (),
        "images": given["images"] or (1,),
        "options": Options(optimization_level=given.pop("optimization_level")),
    }
    arguments.pop("optimization_level", None)
    # A process of its own: the peak is then that of the build.
    with get_context("spawn").Pool(1) as pool:
        measured = pool.apply(measure, (source, arguments))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    facts = {
        "machine": {"cpus": os.cpu_count(), "machine": platform.machine(), "load_average": load},
        "arguments": {key: value for key, value in arguments.items() if key != "options"},
        **measured,
    }
    text = json.dumps(facts, indent=2)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
