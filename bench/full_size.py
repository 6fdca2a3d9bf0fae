"""The full-size model from each checkpoint format to an image, on the CPU: time, peak memory, and equal graphs.

``python -m bench.full_size [--work DIR] [--forms ldm lightning diffusers] [--steps N]`` writes
``bench/results/full_size.json``. It needs 15 GB of disk and 10 GB of memory, and takes some minutes a format.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.checkpoints import write_checkpoint
from sdrt.engines.bundle import Bundle

RESULTS = Path(__file__).parent / "results"
PROMPT = "Great Wall photo"


def measured(*arguments: str, environment: dict[str, str] | None = None) -> dict[str, float]:
    """Run a command of sdrt and give its seconds and peak resident memory, mapped files counted, in GB."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "sdrt", *arguments]
    process = subprocess.Popen(command, env=os.environ | (environment or {}), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }


def build_from(form: Any, work: Path) -> tuple[Path, dict[str, float]]:
    """Write a checkpoint of one format, build its fp32 bundle, and remove the checkpoint."""
    suffix = {"ldm": ".safetensors", "lightning": ".ckpt", "diffusers": ""}[form]
    checkpoint = write_checkpoint(work / f"full-{form}{suffix}", form, "full", seed=0)
    bundle = work / f"bundle-{form}"
    figures = measured("build", "--ckpt", str(checkpoint), "-o", str(bundle), "--precision", "fp32")
    shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
    return bundle, figures


def digests(bundle: Path) -> dict[str, str]:
    """Give the SHA-256 of every file of a bundle."""
    return {entry.path: entry.sha256 for entry in Bundle.open(bundle).manifest.files}


def run_once(bundle: Path, steps: int, output: Path) -> dict[str, Any]:
    """Make one guided 512x512 image; with the seconds of a step, beside those of the whole."""
    arguments = ("--bundle", str(bundle), "--steps", str(steps), "--seed", "42", "--sampler", "ddim")
    # Hashing the bundle at its first use is measured with it.
    with tempfile.TemporaryDirectory() as home:
        return measured(
            *("run", PROMPT, *arguments, "--backend", "onnxruntime", "-o", str(output)), environment={"SDRT_HOME": home}
        )


def main() -> None:
    """Measure all formats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/full-size"))
    parser.add_argument("--forms", nargs="+", default=["ldm", "lightning", "diffusers"])
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "load_average_before": os.getloadavg(),
        "build": {},
    }
    hashes: dict[str, dict[str, str]] = {}
    for form in options.forms:
        bundle, results["build"][form] = build_from(form, options.work)
        hashes[form] = digests(bundle)
        manifest = Bundle.open(bundle).manifest
        results["parity_relative_l2"] = {
            part.name: part.parity.relative_l2 for part in manifest.components if part.parity
        }
        if "run" not in results:
            results["run"] = {"steps": options.steps} | run_once(bundle, options.steps, options.work / "wall.png")
            results["bundle_gb"] = round(Bundle.open(bundle).size / 1e9, 2)
        if form != options.forms[-1]:
            shutil.rmtree(bundle)
        print(json.dumps(results), flush=True)
    first = hashes[options.forms[0]]
    results["equal_graphs_and_weights"] = all(other == first for other in hashes.values())
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "full_size.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
