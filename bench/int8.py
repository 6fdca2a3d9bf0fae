"""What int8 gains and costs: ``python -m bench.int8 [--bundle NAME|DIR] [--int8 DIR] [--rows NAME ...]``.

The int8 bundle is built of the fp32 one, unless it is given. Guided steps of fp32, bf16 and int8 on each backend are
timed in turns. With the demo model the pictures of prompts that it never saw are judged, and compared with those of
fp32 in onnxruntime. Results go to ``bench/results/int8-BUNDLE.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import onnx
from tests.export.demo_prompts import accuracy, pictures, unseen, unseen_pairs

import sdrt
from bench.approximations import psnr
from bench.full_size import PROMPT, RESULTS, measured
from sdrt.engines import demo, store
from sdrt.engines.bundle import Bundle
from sdrt.engines.quantizers import groups, weighted_layers
from sdrt.engines.table import columns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Pictures = list[NDArray[np.uint8]]

ROWS: Final[dict[str, tuple[str, str]]] = {
    "onnxruntime fp32": ("fp32", "onnxruntime"),
    "onnxruntime int8": ("int8", "onnxruntime"),
    "openvino fp32": ("fp32", "openvino:fp32"),
    "openvino bf16": ("fp32", "openvino:bf16"),
    "openvino int8, fp32 elsewhere": ("int8", "openvino:fp32"),
    "openvino int8, bf16 elsewhere": ("int8", "openvino:bf16"),
}
"""By name: which bundle, and what it runs on."""
SAMPLERS: Final = ("plms", "dpmpp_2m")


def described(bundle: Bundle) -> dict[str, Any]:
    """Say what was left of the precision, how large the files are, and which layers are not quantised."""
    unet = bundle.component("unet")
    graph = onnx.load(bundle.path(unet.graph), load_external_data=False).graph
    quantized = {layer for group in groups(graph) for layer in group.layers}
    layers = weighted_layers(graph)
    weights = {name: layer.input[1] for name, layer in layers.items() if name not in quantized}
    assert unet.parity is not None
    return {
        "relative error of the prediction": round(unet.parity.relative_l2, 4),
        "GB": round(bundle.size / 1e9, 3),
        "U-Net GB": round(sum(entry.bytes for entry in unet.files) / 1e9, 3),
        "layers": len(layers),
        "left in fp32": weights,
    }


def timed(bundles: Mapping[str, Path], rows: Sequence[str], rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """By row: seconds of a guided step, the median and the least, over so many rounds in which all take turns."""
    taken: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        pipes = {row: stack.enter_context(sdrt.load(bundles[ROWS[row][0]], backend=ROWS[row][1])) for row in rows}
        for pipe in pipes.values():  # loads and compiles
            next(pipe.steps(PROMPT, num_inference_steps=20, seed=0, sampler="ddim"))
        for round_ in range(rounds):
            for row, pipe in pipes.items():
                found = pipe.steps(PROMPT, num_inference_steps=20, seed=round_, sampler="ddim")
                # Caches are others' before the first step.
                taken[row] += [step.seconds for step in islice(found, 1, 1 + steps)]
    return {
        row: {"seconds a step": round(statistics.median(seconds), 4), "least": round(min(seconds), 4)}
        for row, seconds in taken.items()
    }


def judged(bundles: Mapping[str, Path], rows: Sequence[str], count: int, sampler: str) -> dict[str, dict[str, float]]:
    """By row: shares of pictures that keep to their prompts, and their PSNR against those of fp32 in onnxruntime."""
    prompts = {"unseen prompts": ("all", unseen(count, 1)), "two objects": ("pair", unseen_pairs(count, 3))}
    exact: dict[str, Pictures] = {}
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in dict.fromkeys(("onnxruntime fp32", *rows)):
        ratios: list[float] = []
        with sdrt.load(bundles[ROWS[row][0]], backend=ROWS[row][1]) as pipe:
            for title, (attribute, asked) in prompts.items():
                images = pictures(pipe, [text for _, text in asked], sampler=sampler)
                found[row][title] = round(accuracy(asked, images)[attribute], 4)
                ratios += [psnr(*pair) for pair in zip(images, exact.setdefault(title, images), strict=True)]
        if row != "onnxruntime fp32":
            found[row] |= {
                "PSNR": round(statistics.median(ratios), 1),
                "PSNR of nineteen in twenty": round(statistics.quantiles(ratios, n=20)[0], 1),
            }
        print(f"{sampler}, {row}: {found[row]}", flush=True)
    return found


def table(results: Mapping[str, Any]) -> str:
    """Lay out the rows for people."""
    judgements = results.get("judged", {})
    titles = [f"{sampler.upper()}: {what}" for sampler in judgements for what in ("UNSEEN", "PAIRS", "PSNR", "95%")]
    lines = [("ROW", "STEP", "FASTER", *titles)]
    slowest = max(figures["seconds a step"] for figures in results["rows"].values())
    for row, figures in results["rows"].items():
        shares = [
            f"{100 * value:.1f}%" if value <= 1 else f"{value} dB"
            for sampler in judgements
            for value in judgements[sampler][row].values()
        ]
        faster = f"{slowest / figures['seconds a step']:.2f}x"
        lines.append((row, f"{figures['seconds a step']:.4f} s", faster, *shares))
    return columns(lines)


def main() -> None:
    """Build, measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.int8", description=__doc__.split(":")[0])
    parser.add_argument("--bundle", default=demo.NAME, help="an fp32 ONNX bundle")
    parser.add_argument("--int8", type=Path, help="the int8 bundle of the same model; by default it is built")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="in a round")
    parser.add_argument("--prompts", type=int, default=200, help="of each kind, with the demo model")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    source = store.resolve(options.bundle)
    results: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "load average before": [round(value, 1) for value in os.getloadavg()],
        "model": source.manifest.model.source,
    }
    with tempfile.TemporaryDirectory() as folder:
        place = options.int8 or Path(folder) / "int8"
        if options.int8 is None:
            arguments = ("--from", str(source.folder), "--precision", "int8", "-o", str(place))
            results["build"] = measured("build", *arguments)
        results["int8"] = described(Bundle.open(place))
        bundles = {"fp32": source.folder, "int8": place}
        results["rows"] = timed(bundles, options.rows, options.rounds, options.steps)
        if source.manifest.model.source == demo.NAME:
            results["prompts of each kind"] = options.prompts
            results["judged"] = {name: judged(bundles, options.rows, options.prompts, name) for name in SAMPLERS}
    results["load average after"] = [round(value, 1) for value in os.getloadavg()]
    output = options.output or RESULTS / f"int8-{source.name}.json"
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
