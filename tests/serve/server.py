"""Servers as users start them: `sdrt serve` in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from openai import OpenAI

PATIENCE_S = 120.0
COMMAND = [sys.executable, "-m", "sdrt", "serve"]


def environment(home: Path, **more: str) -> dict[str, str]:
    """What a server is started with: nothing of the tests' own settings, and a backend that compiles nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SDRT_")}
    return {**kept, "SDRT_HOME": str(home), "SDRT_SERVE_BACKEND": "onnxruntime", **more}


class Server:
    """A server that runs.

    Attributes
    ----------
    process
        Its process.
    url
        ``http://127.0.0.1:PORT``, or ``unix:PATH``.
    grpc
        ``127.0.0.1:PORT`` with --grpc-port.

    """

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process = process
        self._errors = errors
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(r"serving (\S+) on (\S+?)(?:, gRPC on (\S+))?\n", line)
        assert match, line + self.errors()
        self.url, self.grpc = match[2], match[3]

    def errors(self) -> str:
        """What it has written to standard error so far."""
        return self._errors.read_text(encoding="utf-8")

    def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_until_ready(self) -> Self:
        """Wait until it makes pictures."""
        until("it is ready", lambda: self.get("/readyz")[0] == 200)
        return self

    def figure(self, name: str) -> float:
        """Sum one of its metrics over all labels."""
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return sum(map(float, found))

    def client(self, key: str = "none") -> OpenAI:
        """OpenAI's own client for it."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)

    def log(self) -> list[dict[str, Any]]:
        """Its log, of which every line is an object with --log-format json."""
        whole, _, _ = self.errors().rpartition("\n")  # what comes after that is still being written
        return [json.loads(line) for line in whole.splitlines()]


def until(what: str, holds: Any, *, within_s: float = PATIENCE_S) -> None:
    """Wait for something, and fail if it does not come."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, f"waited {within_s:g} s for this: {what}"
        time.sleep(0.02)


@contextmanager
def serving(home: Path, *options: str, bundle: str = "demo", **more: str) -> Iterator[Server]:
    """Run a server with the demo model on a port of its own, unless options say otherwise, and end it."""
    errors = home / f"errors-{time.monotonic_ns()}.txt"
    port = () if "--uds" in options else ("--port", "0")
    with errors.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, "--bundle", bundle, *port, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment(home, **more),
        )
    try:
        yield Server(process, errors)
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)
