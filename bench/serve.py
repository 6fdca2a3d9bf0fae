"""A server under load and in trouble: ``python -m bench.serve [--only overload,sigterm,...]``.

Each row starts servers of its own with the demo model and onnxruntime, on this machine, whose cores the clients share.
Its results go into ``bench/results/serve.json`` as soon as it ends. Rows of many servers note each in a journal in
``--work`` and go on from there when they are run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.full_size import RESULTS
from bench.serve_document import document
from bench.serve_life import disconnect, parent, sigterm
from bench.serve_load import batching, overload
from sdrt.engines import demo

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS: Final[dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]]] = {
    "overload": lambda home, given: overload(home, seconds=given.seconds, factor=given.factor),
    "batching": lambda home, given: batching(home, seconds=given.closed_seconds, rounds=given.rounds),
    "sigterm": lambda home, given: sigterm(home, signals=given.signals),
    "disconnect": lambda home, given: disconnect(home, disconnects=given.disconnects),
    "parent": lambda home, given: parent(home, deaths=given.deaths),
    "schemathesis": lambda home, given: document(home, cases=given.cases, examples=given.examples),
}


def commit() -> str:
    """Name the state of the sources, with a ``-dirty`` where they differ from the last commit."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9"]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__.split(":")[0])
    parser.add_argument("--only", default=",".join(ROWS), help="rows, with commas between them")
    parser.add_argument("--work", type=Path, default=Path("build/serve"))
    parser.add_argument("--output", type=Path, default=RESULTS / "serve.json")
    parser.add_argument("--seconds", type=float, default=120, help="of overload")
    parser.add_argument("--factor", type=float, default=10, help="of overload, times the capacity")
    parser.add_argument("--closed-seconds", type=float, default=20, help="of each load of batching")
    parser.add_argument("--rounds", type=int, default=2, help="of batching")
    parser.add_argument("--signals", type=int, default=100)
    parser.add_argument("--disconnects", type=int, default=1000)
    parser.add_argument("--deaths", type=int, default=60, help="of parents")
    parser.add_argument("--cases", type=int, default=10_000, help="of schemathesis, at least")
    parser.add_argument("--examples", type=int, default=80, help="of schemathesis, an operation and run")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := set(names) - set(ROWS):
        parser.error(f"--only has {', '.join(sorted(unknown))}: expected some of {', '.join(ROWS)}")
    home = given.work.resolve()
    home.mkdir(parents=True, exist_ok=True)
    demo.bundle_folder(home)
    for name in names:
        machine = {
            "commit": commit(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
            "load average before": [round(value, 1) for value in os.getloadavg()],
        }
        row = ROWS[name](home, given)
        row = machine | {"load average after": [round(value, 1) for value in os.getloadavg()]} | row
        print(json.dumps({name: row}, indent=2), flush=True)
        results = json.loads(given.output.read_text(encoding="utf-8")) if given.output.exists() else {}
        given.output.write_text(json.dumps(results | {name: row}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
