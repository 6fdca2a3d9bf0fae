"""What the kernels in C gain: a guided step of a bundle's U-Net in OpenVINO's bf16, with them and without, in turns.

All in one process, so that a machine whose speed changes is the same for all: ``python -m bench.kernels BUNDLE``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest.mock import patch

import numpy as np

from sdrt.engines.bundle import Bundle
from sdrt.engines.manifest import DimRange
from sdrt.runtime import backends, kernels
from sdrt.runtime.compile_cache import CompileCache

OWN, THEIRS = "with the kernels", "OpenVINO's own"


def main() -> None:
    """Print seconds, and how far the prediction is from fp32's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="an ONNX bundle: its name or folder")
    parser.add_argument("--size", type=int, default=512, help="pixels of height and width [default: 512]")
    parser.add_argument("--rounds", type=int, default=6, help="[default: 6]")
    parser.add_argument("--pause", type=float, default=0, help="seconds of standing still before each [default: 0]")
    given = parser.parse_args()
    if kernels.kernels() is None:
        parser.error("the kernels are not compiled, or this CPU has no AMX: sdrt doctor tells")
    bundle = Bundle.open(given.bundle)
    sizes = {"batch": 2, "height": given.size // 8, "width": given.size // 8}
    unet = bundle.component("unet")
    shapes = {
        spec.name: tuple(sizes[dim.name] if isinstance(dim, DimRange) else dim for dim in spec.shape)
        for spec in (*unet.inputs, *(output for output in unet.outputs if output.name == "prediction"))
    }
    rng = np.random.default_rng(0)
    values = {spec.name: rng.standard_normal(shapes[spec.name], np.float32) for spec in unet.inputs}
    values["latents"][1] = values["latents"][0]
    values["timestep"][:] = 501
    bindings = {}
    for name, precision, found in (("fp32", "fp32", None), (THEIRS, "bf16", None), (OWN, "bf16", kernels.kernels())):
        session = backends._openvino_session(  # noqa: SLF001 - one component, and no pipeline around it
            bundle, "unet", precision, CompileCache(bundle, "openvino")
        )
        with patch.object(kernels, "kernels", lambda found=found: found):
            began = time.perf_counter()
            bindings[name] = session.bind(shapes, in_pairs=True)
            print(f"{name}: loaded in {time.perf_counter() - began:.2f} s", flush=True)
        for key, value in values.items():
            bindings[name].inputs[key][...] = value
        bindings[name].run()
    exact = bindings.pop("fp32").outputs["prediction"]
    seconds: dict[str, list[float]] = {name: [] for name in bindings}
    for _ in range(given.rounds):
        for name, binding in bindings.items():
            time.sleep(given.pause)
            began = time.perf_counter()
            binding.run()
            seconds[name].append(time.perf_counter() - began)
    first = statistics.median(seconds[THEIRS])
    for name, binding in bindings.items():
        middle = statistics.median(seconds[name])
        error = np.linalg.norm(binding.outputs["prediction"] - exact) / np.linalg.norm(exact)
        print(f"{name}: {middle:.3f} s, {middle / first:.2f} of OpenVINO's own; {100 * error:.2f}% from fp32")


if __name__ == "__main__":
    main()
