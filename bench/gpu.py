"""What sdrt does on an NVIDIA GPU, beside diffusers and beside what the GPU could do at most.

``python -m bench.gpu`` takes at most eight minutes. It makes a full-size checkpoint of random weights, builds bundles
of it, and measures every backend that is installed, each in a process of its own; `bench.gpu_rows` does the measuring.
A row is skipped, and says so, where a package, a GPU or time is missing; it fails, and says so, where its process does.
Figures go to ``bench/results/gpu-NAME.json`` and, as a table, to standard output. Without a GPU every row is skipped,
nothing is written, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdrt.engines.devices import nvidia_gpus
from sdrt.engines.table import columns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings")


@dataclass(frozen=True)
class Row:
    """One thing to do or to measure.

    Attributes
    ----------
    name
        Its name on the command line and in the results.
    modules
        What has to be installed.
    after
        Rows that have to have succeeded.
    most
        Seconds that it may take; it is skipped where less than a third of that is left.

    """

    name: str
    modules: tuple[str, ...]
    after: tuple[str, ...] = ()
    most: float = 240


#: In the order of what matters, as time may run out; compiling with torch takes longest and comes last.
ROWS = (
    Row("checkpoint", ("torch", "diffusers", "transformers")),
    Row("matmul", ("torch",), most=60),
    Row("onnx", ("torch", "onnx", "onnxscript"), ("checkpoint",)),
    Row("diffusers", ("torch", "diffusers", "transformers"), ("checkpoint",), 120),
    Row("tensorrt-rtx-build", ("tensorrt_rtx",), ("onnx",)),
    Row("tensorrt-rtx", ("tensorrt_rtx", "cuda.bindings"), ("tensorrt-rtx-build",), 120),
    Row("onnxruntime-cuda", ("onnxruntime", "cuda.bindings"), ("onnx",), 120),
    Row("tensorrt-build", ("tensorrt",), ("onnx",)),
    Row("tensorrt", ("tensorrt", "cuda.bindings"), ("tensorrt-build",), 120),
    Row("diffusers-compiled", ("torch", "diffusers", "transformers", "triton"), ("checkpoint",)),
)


def reason_to_skip(row: Row, done: Mapping[str, Mapping[str, Any]], left: float) -> str | None:
    """Tell why a row is not run; None if it is.

    Parameters
    ----------
    row
        The row.
    done
        What became of the rows before it.
    left
        Seconds that are left for all.

    """
    if not nvidia_gpus():
        return "no NVIDIA GPU: the CUDA driver shows none"
    missing = [module for module in row.modules if not _installed(module)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    lacking = [name for name in row.after if done.get(name, {}).get("status") != "done"]
    if lacking:
        return f"it needs {', '.join(lacking)}"
    if left < row.most / 3:
        return f"{left:.0f} seconds are left"
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def run_row(row: Row, arguments: list[str], left: float) -> dict[str, Any]:
    """Run a row in a process of its own and return what it measured, or how it ended."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "bench.gpu_rows", row.name, *arguments]
    limit = min(row.most, left)
    # Compilers of torch's leave children: the whole group is ended.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return {"status": "failed", "reason": f"it took more than {limit:.0f} seconds"}
    seconds = round(time.perf_counter() - began, 1)
    if process.returncode:
        last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return {"status": "failed", "reason": last, "seconds": seconds}
    return {"status": "done", "seconds": seconds, "figures": json.loads(output.strip().splitlines()[-1])}


def run_all(
    rows: tuple[Row, ...], arguments: list[str], budget: float, tell: Callable[[str], object]
) -> dict[str, dict[str, Any]]:
    """Run the rows that can be run, in order, within `budget` seconds."""
    began = time.perf_counter()
    done: dict[str, dict[str, Any]] = {}
    for row in rows:
        left = budget - (time.perf_counter() - began)
        if reason := reason_to_skip(row, done, left):
            done[row.name] = {"status": "skipped", "reason": reason}
        else:
            done[row.name] = run_row(row, arguments, left)
        outcome = done[row.name]
        tell(f"{row.name}: {outcome['status']} {outcome.get('reason', '')}".rstrip())
    return done


def machine() -> dict[str, Any]:
    """Tell what was measured on."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [f"{gpu.name}, {gpu.compute_capability}, {gpu.memory / 2**30:.0f} GiB" for gpu in nvidia_gpus()]
    return {"gpus": gpus, "cpus": os.cpu_count(), "platform": platform.platform(), "packages": versions}


def table(done: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out what was measured, and tell of each other row what became of it."""
    heads = ("ROW", "STEP ms", "it/s", "TEXT ms", "VAE ms", "20 STEPS s", "x4", "GB", "HOST us", "START s", "PSNR dB")
    lines: list[tuple[str, ...]] = [heads]
    notes: list[str] = []
    for name, outcome in done.items():
        if outcome["status"] != "done":
            notes.append(f"{name} {outcome['status']}: {outcome['reason']}")
            continue
        figures = outcome["figures"]
        if "step_ms" not in figures:
            shown = ", ".join(f"{key} {value}" for key, value in figures.items())
            notes.append(f"{name}: {shown or 'done'} ({outcome['seconds']} s)")
            continue
        start = figures.get("start_s", {})
        parity = figures.get("psnr_db", {})
        lines.append(
            (
                name,
                _number(figures["step_ms"]),
                _number(1000 / figures["step_ms"]),
                _number(figures.get("text_ms")),
                _number(figures.get("vae_ms")),
                _number(figures["latency_s"].get("1x20")),
                _number(figures["latency_s"].get("4x20")),
                _number(figures.get("peak_gb")),
                _number(figures.get("host_us")),
                "/".join(_number(start[key]) for key in ("cold", "warm") if key in start),
                "/".join(_number(parity[key]) for key in ("1", "20", "50") if key in parity),
            )
        )
    return "\n".join([*([columns(lines), ""] if len(lines) > 1 else []), *notes])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], default=[row.name for row in ROWS])
    parser.add_argument("--work", type=Path, help="keep checkpoint and bundles there [default: a temporary folder]")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="of the model [default: full]")
    parser.add_argument("--minutes", type=float, default=8.0, help="that it may take in all [default: 8]")
    options = parser.parse_args()
    rows = tuple(row for row in ROWS if row.name in options.rows)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        arguments = ["--work", str(work.resolve()), "--size", options.size]
        done = run_all(rows, arguments, 60 * options.minutes, lambda line: print(line, file=sys.stderr, flush=True))
    facts = {"machine": machine(), "size": options.size, "rows": done}
    print(table(done))
    gpus = nvidia_gpus()
    if not gpus:
        print("\nNothing was measured, and no file is written: there is no NVIDIA GPU.")
        return
    RESULTS.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", gpus[0].name.lower()).strip("-")
    file = RESULTS / f"gpu-{name}.json"
    file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"\n{file}")


if __name__ == "__main__":
    main()
