"""schemathesis against the document that a server serves: https://schemathesis.readthedocs.io."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from tests.serve.server import Server, serving

from bench import serve_hooks

CHECKS: Final = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)
KEY: Final = "open-sesame"
SERVERS: Final = (((), {"SDRT_API_KEY": KEY}), (("--allow-shared-memory",), {}))
"""Options and environment of the servers, which take turns: what one of them refuses the other one does."""


def document(home: Path, *, cases: int, examples: int) -> dict[str, Any]:
    """Have requests generated from the served document, right ones and wrong ones, until there are enough.

    Parameters
    ----------
    home
        Where the demo is unpacked.
    cases
        How many at least.
    examples
        Of an operation in a run; there are as many runs as it takes, each with a seed of its own.

    """
    calls: Counter[str] = Counter()
    failures: list[str] = []
    began = time.monotonic()
    for seed, (options, environment) in enumerate(cycle(SERVERS)):
        with serving(home, *options, **environment) as server:
            server.wait_until_ready()
            calls += _generated(server, examples, seed, failures)
        print(f"schemathesis: {calls.total()} of {cases} cases, {len(failures)} runs with failures", flush=True)
        if failures or (calls.total() >= cases and seed + 1 >= len(SERVERS)):
            break
    statuses: Counter[str] = Counter()
    for name, number in calls.items():
        statuses[name.rpartition(" ")[2]] += number
    return {
        "cases": calls.total(),
        "seconds": round(time.monotonic() - began),
        "checks": CHECKS,
        "failures": failures,
        "answers by status": dict(sorted(statuses.items())),
        "answers by operation and status": dict(sorted(calls.items())),
    }


def _generated(server: Server, examples: int, seed: int, failures: list[str]) -> Counter[str]:
    """Run schemathesis once, and count its calls by operation and status; what it finds is added to the failures."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "calls.json"
        options = {
            "--checks": ",".join(CHECKS),
            "--max-examples": str(examples),
            "--seed": str(seed),
            "--phases": "examples,coverage,fuzzing",
            "--header": f"Authorization: Bearer {KEY}",
            "--request-timeout": "120",
            "--generation-database": "none",
            "--suppress-health-check": "all",
        }
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"]
        more = {"SCHEMATHESIS_HOOKS": serve_hooks.__name__, serve_hooks.COUNTS: str(counts)}
        done = subprocess.run(
            [*command, *(part for option in options.items() for part in option)],
            cwd=folder,
            env=os.environ | more | {"PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            failures.append(done.stdout[-20_000:] + done.stderr[-2_000:])
        return Counter(json.loads(counts.read_text()))
