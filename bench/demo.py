"""How well the demo model keeps to its prompts: ``python -m bench.demo``.

The prompts were never seen in training (captions reserved for tests, and combinations of shape, colour and background
held out); the pictures come from the shipped bundle through the pipeline; `tests/judge.py` reads them. Results go to
``bench/results/demo.json``, a grid of pictures to ``bench/results/demo.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from tests.export.demo_prompts import held_out, measured, pictures, unseen, unseen_pairs
from tests.judge import read

import sdrt
from sdrt.runtime.samplers import SAMPLERS

RESULTS: Final = Path(__file__).parent / "results"
GRID: Final = (
    "a large red star on a blue background",
    "a small yellow circle at the top on purple",
    "green ring, white background",
    "a white cross on the left on black",
    "a pink triangle at the bottom, green background",
    "a large cyan square on an orange background",
    "a red star to the left of a green square on white",
    "a blue circle above a yellow ring on black",
)


def accuracies(pipe: sdrt.Pipeline, count: int) -> dict[str, dict[str, float]]:
    """Shares of right pictures, by kind of prompt and sampler, then by attribute."""
    asked = unseen(count, seed=1)
    found = {
        "unseen prompts": measured(pipe, asked),
        "held-out combinations": measured(pipe, held_out(count, seed=2)),
        "two objects": measured(pipe, unseen_pairs(count, seed=3)),
        "unseen prompts, guidance 1": measured(pipe, asked, guidance_scale=1.0),
        "unseen prompts, as `sdrt run` sets it (50 steps, guidance 7.5)": measured(
            pipe, asked, guidance_scale=7.5, num_inference_steps=50
        ),
    }
    for sampler in sorted(SAMPLERS):
        found[f"unseen prompts, {sampler}"] = measured(pipe, unseen(count, seed=4), sampler=sampler)
    return {name: {key: round(value, 4) for key, value in shares.items()} for name, shares in found.items()}


def red_stars(pipe: sdrt.Pipeline, count: int) -> dict[str, float]:
    """Share of red stars among "a star on a blue background", without and with the negative prompt "red"."""
    shares = {}
    for name, negative in (("no negative prompt", ""), ("negative prompt red", "red")):
        images = pictures(pipe, ["a star on a blue background"] * count, negative_prompt=negative)
        red = [any((each.shape, each.colour) == ("star", "red") for each in read(image).objects) for image in images]
        shares[name] = float(np.mean(red))
    return shares


def command_seconds(repeats: int) -> dict[str, list[float]]:
    """Wall time of `sdrt run` with 20 steps, start included: the first unpacks the bundle and hashes it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"SDRT_HOME": folder}
        command = [str(Path(sys.executable).with_name("sdrt")), "run", GRID[0], "--steps", "20"]
        taken = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            subprocess.run([*command, "-o", f"{folder}/a.png"], check=True, capture_output=True, env=environment)
            taken.append(round(time.perf_counter() - began, 2))
    return {"first": taken[:1], "later": taken[1:]}


def save_grid(pipe: sdrt.Pipeline, path: Path) -> None:
    """Four seeds below each other, a column a prompt."""
    rows = [np.concatenate(pictures(pipe, list(GRID), seed=100 * row), axis=1) for row in range(4)]
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--prompts", type=int, default=200, help="of each kind")
    parser.add_argument("--output", type=Path, default=RESULTS / "demo.json")
    options = parser.parse_args()
    with sdrt.load("demo") as pipe:
        results: dict[str, Any] = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "sdrt run, 20 steps, seconds": command_seconds(3),
            "prompts of each kind": options.prompts,
            "red stars": red_stars(pipe, options.prompts),
            "accuracy": accuracies(pipe, options.prompts),
        }
        save_grid(pipe, options.output.with_suffix(".png"))
    results["load average"] = [round(value, 1) for value in os.getloadavg()]
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
