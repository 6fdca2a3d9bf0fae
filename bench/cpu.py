"""Everything about speed on this CPU, for the full-size model: ``python -m bench.cpu [--bundle DIR] [--only ROW ...]``.

Without a bundle it writes a full-size checkpoint of random weights and builds one, which takes 3 minutes, 9 GB of
memory and 7 GB of disk; the rows take about two hours on two cores. Each row is a process of its own, and its figures
are in ``bench/results/cpu.json`` as soon as it has ended: run the same again to go on after the last one, or with
``--only`` to measure rows anew. At the end it prints what was aimed at beside what was measured, and
``python -m bench.plots`` draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from bench.checkpoints import Size, write_checkpoint
from sdrt.engines.bundle import Bundle
from sdrt.engines.table import columns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

RESULTS: Final = Path(__file__).parent / "results"
COMPARE_STEP: Final = "openvino-raw,diffusers-bf16,diffusers-compile,diffusers"
COMPARE_PICTURE: Final = "diffusers-bf16,diffusers-compile"
#: The approximations whose time is held against the exact run.
APPROXIMATION: Final = "guidance 0.3 to 5, cache 3"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes
    ----------
    module
        What is run with ``python -m``.
    arguments
        What it is given, on top of the bundle.
    writes
        Whether it writes its JSON to ``--output`` rather than printing it.

    """

    module: str
    arguments: tuple[str, ...]
    writes: bool = False


def _bench(backend: str, only: str, *more: str) -> Row:
    return Row("sdrt", ("bench", "--backend", backend, "--sampler", "ddim", "--only", only, "--json", *more))


def _growth(axis: str, *more: str) -> Row:
    return Row("bench.growth", (axis, "--backend", "openvino", *more))


#: In the order of what matters, should somebody stop it.
ROWS: Final[dict[str, Row]] = {
    "step openvino": _bench("openvino", "step", "--rounds", "2", "--launches", "2", "--compare", COMPARE_STEP),
    "step openvino:fp32": _bench("openvino:fp32", "step", "--compare", "openvino-raw-fp32,diffusers"),
    "step onnxruntime": _bench("onnxruntime", "step", "--compare", "onnxruntime-raw"),
    "start openvino": _bench("openvino", "start", "--steps", "2"),
    "start openvino:fp32": _bench("openvino:fp32", "start", "--steps", "2"),
    "start onnxruntime": _bench("onnxruntime", "start", "--steps", "2"),
    "picture openvino": _bench("openvino", "picture", "--rounds", "2", "--compare", COMPARE_PICTURE),
    "approximations": Row(
        "bench.approximations", ("--backend", "openvino", "--sampler", "plms", "--rounds", "1"), writes=True
    ),
    "growth steps": _growth("steps", "--rounds", "1"),
    "growth batch": _growth("batch"),
    "growth pixels": _growth("side"),
    "parts openvino": _bench("openvino", "text,decode", "--rounds", "3", "--compare", COMPARE_STEP),
}


def prepare(work: Path, size: Any) -> Path:
    """Write a checkpoint of random weights and build its bundle, unless they are there."""
    checkpoint, bundle = work / "checkpoint", work / "bundle"
    if not bundle.exists():
        if not (checkpoint / "vae").exists():
            write_checkpoint(checkpoint, "diffusers", size, dtype="float16")
        build = ("build", "--ckpt", str(checkpoint), "-o", str(bundle), "--precision", "fp32", "--backend", "onnx")
        subprocess.run([sys.executable, "-m", "sdrt", *build], check=True, stdout=subprocess.DEVNULL)
    return bundle


def run_row(row: Row, bundle: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """Run a row and return what it measured, or how it ended; what it has to say meanwhile goes to standard error."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "figures.json"
        command = [sys.executable, "-m", row.module, *row.arguments, "--bundle", str(bundle), *more]
        command += ["--output", str(written)] if row.writes else []
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(command, check=False, stdout=output)
            output.seek(0)
            outcome: dict[str, Any] = {
                "status": "failed" if done.returncode else "done",
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - began, 1),
                "load_average": [round(value, 2) for value in os.getloadavg()],
            }
            if done.returncode:
                return outcome | {"reason": f"exit code {done.returncode}"}
            figures = json.loads(written.read_text() if row.writes else output.read())
            return outcome | {"figures": _without_folders(figures)}


def _without_folders(figures: dict[str, Any]) -> dict[str, Any]:
    """Leave out where things lie on the machine that has measured; `model_of` tells what they are."""
    return {name: value for name, value in figures.items() if name not in {"bundle_folder", "checkpoint"}}


def run_all(
    names: Sequence[str], bundle: Path, output: Path, more: Mapping[str, Sequence[str]], tell: Callable[[str], object]
) -> dict[str, Any]:
    """Run rows, keeping what each has measured as soon as it has.

    Parameters
    ----------
    names
        Of `ROWS`.
    bundle
        What is measured.
    output
        The file of results; what it has of other rows stays.
    more
        By module, arguments for all of its rows.
    tell
        Called with a line for each row.

    """
    results = read_results(output)
    model = model_of(bundle)
    if results.setdefault("model", model) != model:
        sys.exit(f"{output} has results of {results['model']}, and this is {model}: give another --output")
    rows = results.setdefault("rows", {})
    for number, name in enumerate(names, 1):
        tell(f"{name} ({number} of {len(names)})")
        rows[name] = run_row(ROWS[name], bundle, more.get(ROWS[name].module, ()))
        tell(f"{name}: {rows[name]['status']} after {rows[name]['seconds']} s")
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = output.with_suffix(".draft")
        draft.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        draft.replace(output)
    return results


def read_results(output: Path) -> dict[str, Any]:
    """Read what earlier runs have measured."""
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    return found


def model_of(bundle: Path) -> dict[str, Any]:
    """Tell what a bundle's figures are of, wherever it lies."""
    manifest = Bundle.open(bundle).manifest
    weights = max(manifest.files, key=lambda file: file.bytes)
    return {"precision": manifest.precision, "bytes": weights.bytes, "sha256": weights.sha256}


@dataclass(frozen=True)
class Criterion:
    """Something that is aimed at: what, where its figure is, and the bound."""

    what: str
    row: str
    figure: Callable[[dict[str, Any]], float | None]
    bound: float
    at_least: bool = False


def _ratio(part: str, *peers: str) -> Callable[[dict[str, Any]], float | None]:
    """Give sdrt's time by that of the fastest of some peers."""

    def figure(found: dict[str, Any]) -> float | None:
        done = [found["peers"][name] for name in peers if found["peers"].get(name, {}).get("status") == "done"]
        return max((peer["ratio"][part] for peer in done), default=None)

    return figure


def _by_floor(precision: str) -> Callable[[dict[str, Any]], float | None]:
    def figure(found: dict[str, Any]) -> float | None:
        floor = found["floor"].get(precision)
        return None if floor is None else float(found["sdrt"]["step"]["median"] / floor["step"])

    return figure


def _faster(setting: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda found: float(found["settings"]["exact"]["seconds"] / found["settings"][setting]["seconds"])


CRITERIA: Final = (
    Criterion("step by the bf16 floor", "step openvino", _by_floor("bf16"), 1.10),
    Criterion("step by openvino-raw", "step openvino", _ratio("step", "openvino-raw"), 1.03),
    Criterion("step by diffusers bf16", "step openvino", _ratio("step", "diffusers-bf16"), 0.75),
    Criterion("step by diffusers fp32", "step openvino", _ratio("step", "diffusers"), 0.40),
    # Of steps that follow upon each other, as users have them: before one in turns a process has stood still.
    Criterion(
        "outside the engine, ms a step",
        "picture openvino",
        lambda found: 1000 * found["sdrt"]["outside_engine"]["median"],
        2.0,
    ),
    Criterion("picture by the best diffusers", "picture openvino", _ratio("picture", *COMPARE_PICTURE.split(",")), 0.7),
    Criterion("onnxruntime, peak GB of steps", "step onnxruntime", lambda found: found["sdrt"]["peak_gb"], 4.5),
    Criterion("onnxruntime by its plain graph", "step onnxruntime", _ratio("step", "onnxruntime-raw"), 0.9),
    Criterion(
        "first step of a warm start, s", "start openvino", lambda found: found["sdrt"]["start"]["warm"]["median"], 3.0
    ),
    Criterion(f"faster with {APPROXIMATION}", "approximations", _faster(APPROXIMATION), 2.5, at_least=True),
    Criterion("exponent of steps", "growth steps", lambda found: found["fits"]["loop"]["exponent"], 1.0),
    Criterion("exponent of batch", "growth batch", lambda found: found["fits"]["loop"]["exponent"], 1.0),
)


def judgement(results: Mapping[str, Any]) -> str:
    """Lay out what was aimed at and what was measured."""
    lines = [("", "AIM", "MEASURED", "")]
    for criterion in CRITERIA:
        outcome = results["rows"].get(criterion.row, {"status": "not measured"})
        figure = criterion.figure(outcome["figures"]) if outcome["status"] == "done" else None
        sign = ">=" if criterion.at_least else "<="
        if figure is None:
            shown, verdict = outcome["status"], ""
        else:
            met = figure >= criterion.bound if criterion.at_least else figure <= criterion.bound
            shown, verdict = f"{figure:.3g}", "met" if met else "missed"
        lines.append((criterion.what, f"{sign} {criterion.bound:g}", shown, verdict))
    return columns(lines)


def main() -> None:
    """Measure what is left, or what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--bundle", type=Path, help="a full-size fp32 bundle [default: one of random weights is built]")
    parser.add_argument("--ckpt", help="the checkpoint that it was built of [default: what its manifest names]")
    parser.add_argument("--work", type=Path, default=Path("build/cpu"), help="for what is built [default: build/cpu]")
    parser.add_argument("--size", choices=get_args(Size), default="full", help="of what is built [default: full]")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"measure anew: {', '.join(ROWS)}")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json")
    options = parser.parse_args()
    bundle = options.bundle or prepare(options.work, options.size)
    known = read_results(options.output).get("rows", {})
    names = options.only or [name for name in ROWS if known.get(name, {}).get("status") != "done"]
    more = {"sdrt": ["--ckpt", options.ckpt] if options.ckpt else []}
    results = run_all(names, bundle, options.output, more, lambda line: print(line, file=sys.stderr, flush=True))
    print(judgement(results))


if __name__ == "__main__":
    main()
