"""How long the command line takes to start, beyond the interpreter itself.

``python -m bench.startup [--repeats N]`` prints JSON: for each command the median, the fastest and the slowest run in
seconds, and the median less that of ``python -c pass``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

COMMANDS: Final[dict[str, list[str]]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import sdrt": [sys.executable, "-c", "import sdrt"],
    "sdrt --help": [str(Path(sys.executable).with_name("sdrt")), "--help"],
    "sdrt run --help": [str(Path(sys.executable).with_name("sdrt")), "run", "--help"],
}


def measure(repeats: int) -> dict[str, dict[str, float]]:
    """Run every command in turn, `repeats` times, so that a slow moment of the machine falls on all of them alike.

    Parameters
    ----------
    repeats
        Runs that count; one more comes first, to fill the file system's cache.

    Returns
    -------
    dict
        For each command ``median``, ``min``, ``max`` and ``beyond_python``, in seconds.

    """
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(repeats + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:
                times[name].append(time.perf_counter() - start)
    floor = statistics.median(times["python -c pass"])
    return {
        name: {
            "median": round(statistics.median(taken), 4),
            "min": round(min(taken), 4),
            "max": round(max(taken), 4),
            "beyond_python": round(statistics.median(taken) - floor, 4),
        }
        for name, taken in times.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
    print(json.dumps({**machine, "repeats": repeats, "seconds": measure(repeats)}, indent=2))


if __name__ == "__main__":
    main()
