"""What the C++ library costs beyond the Python call in process: ``python -m bench.embed``.

A server of the demo model, asked by ``bench/embed.cpp`` through the library of ``embed/``, against the same pipeline in
this process, turn about, at 512x512: from the call to the first step, and from the last step to the pixels in the
caller's memory, its own or shared. Both are mostly the work itself, which varies by more than what is looked for; so
there is also what is left of the library's times without the work, as the server measured that of the very picture.
cmake and a C++ compiler are needed. Results go to ``bench/results/embed.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sdrt

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "bench" / "results" / "embed.json"
PROMPT: Final = "a large red star on a blue background"
SIDE: Final = 512
BACKEND: Final = "onnxruntime"
ALLOWED_MS: Final = 3.0


class Times(NamedTuple):
    """Of one picture, in milliseconds."""

    until_first_step: float
    after_last_step: float


class Told(NamedTuple):
    """What the C++ program tells of one."""

    times: Times
    beyond: Times
    """Without the work: preparing and the first step, and decoding."""
    checksum: int


class Client:
    """The C++ program with its own server, which makes one picture a line."""

    def __init__(self, program: Path, steps: int) -> None:
        options = ["--backend", BACKEND, "--max-size", f"{SIDE}x{SIDE}"]
        environment = os.environ | {"SDRT_PROGRAM": str(Path(sys.executable).with_name("sdrt"))}
        words = [program, PROMPT, str(SIDE), str(steps), *options]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(words, **pipes, text=True, env=environment)

    def picture(self, place: str) -> Told:
        """Make one, its pixels being put into "memory" or "shared" memory."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{place}\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        first, after = told["first"] - told["called"], told["returned"] - told["last"]
        (phases,) = told["settings"]["phases"]
        work = phases["prepare"] + told["first_took"], phases["decode"]
        return Told(
            Times(1e3 * first, 1e3 * after), Times(1e3 * (first - work[0]), 1e3 * (after - work[1])), told["sum"]
        )

    def end(self) -> None:
        """Let it end, and its server with it."""
        self._process.communicate(timeout=60)


def in_process(pipe: sdrt.Pipeline, steps: int) -> tuple[Times, Image]:
    """Make the same picture with the pipeline of this process."""
    seen: list[float] = []

    def step_done(*_: Any) -> None:
        seen.append(time.perf_counter())

    began = time.perf_counter()
    (image,) = pipe(PROMPT, width=SIDE, height=SIDE, num_inference_steps=steps, seed=42, callback_on_step_end=step_done)
    ended = time.perf_counter()
    return Times(1e3 * (seen[0] - began), 1e3 * (ended - seen[-1])), image


def checksum(image: Image) -> int:
    """As ``bench/embed.cpp`` has it."""
    total = 0
    for byte in image.tobytes():
        total = (total * 31 + byte) & 0xFFFFFFFF
    return total


def build(folder: Path) -> Path:
    """Build the library and the program; give the latter's path."""
    cmake = ["cmake", "-S", ROOT / "embed", "-B", folder, "-DSDRT_BUILD_EXAMPLES=OFF"]
    program = folder / "embed"
    options = ["-std=c++17", "-O2", f"-I{ROOT / 'embed' / 'include'}", f"-L{folder}", f"-Wl,-rpath,{folder}"]
    compiler = [os.environ.get("CXX", "g++"), *options, ROOT / "bench" / "embed.cpp", "-lsdrt", "-o", program]
    for command in (cmake, ["cmake", "--build", folder, "--parallel", "2"], compiler):
        subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return program


def compare(
    pipe: sdrt.Pipeline, client: Client, place: str, rounds: int, steps: int
) -> dict[str, dict[str, list[float]]]:
    """Make pictures both ways, turn about, and give the quartiles of each, of the differences, and of the rest."""
    _, image = in_process(pipe, steps)
    if client.picture(place).checksum != checksum(image):
        raise SystemExit("the pictures differ")
    own: list[Times] = []
    theirs: list[Told] = []
    for number in range(rounds):
        if number % 2:
            theirs.append(client.picture(place))
        own.append(in_process(pipe, steps)[0])
        if not number % 2:
            theirs.append(client.picture(place))
    found = {}
    for name in Times._fields:
        python = [getattr(times, name) for times in own]
        library = [getattr(told.times, name) for told in theirs]
        found[name] = {
            "python_ms": _quartiles(python),
            "library_ms": _quartiles(library),
            "difference_ms": _quartiles([other - one for one, other in zip(python, library, strict=True)]),
            "beyond_the_work_ms": _quartiles([getattr(told.beyond, name) for told in theirs]),
        }
    return found


def _quartiles(values: list[float]) -> list[float]:
    return [round(value, 3) for value in statistics.quantiles(values, n=4)]


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.embed", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=40, help="pictures each way")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "backend": BACKEND,
        "size": f"{SIDE}x{SIDE}",
        "steps": options.steps,
        "rounds": options.rounds,
        "allowed_ms": ALLOWED_MS,
    }
    with tempfile.TemporaryDirectory() as folder, sdrt.load("demo", backend=BACKEND) as pipe:
        client = Client(build(Path(folder)), options.steps)
        for place in ("memory", "shared"):
            results[f"into {place}"] = compare(pipe, client, place, options.rounds, options.steps)
        client.end()
    results["load average"] = [round(value, 1) for value in os.getloadavg()]
    text = json.dumps(results, indent=2)
    options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
