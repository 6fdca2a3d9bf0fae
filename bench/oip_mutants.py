"""Send mutants of requests in the Open Inference Protocol to a server: whatever comes, it goes on, and never fails.

    python -m bench.oip_mutants --count 100000

starts `sdrt serve` with the demo model, sends mutants over HTTP (JSON, and binary data behind it) and gRPC, and writes
`results/oip-mutants.json`. Each mutant follows from the seed and its number alone. A run that was broken off goes on
where it was, unless `--afresh` is given.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from .oip_grpc_calls import grpc_calls
from .oip_http_calls import HEADER_LENGTH, http_calls

if TYPE_CHECKING:
    from collections.abc import Iterable

RESULT: Final = Path(__file__).parent / "results" / "oip-mutants.json"
KEY: Final = "/sdrt-mutants"
_CHUNK: Final = 1000
_THREADS: Final = 4
_PATIENCE_S: Final = 60.0
_SERVICE: Final = "/inference.GRPCInferenceService/"
_STREAM: Final = "ModelStreamInfer"
_FAULTS: Final = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
"""gRPC's codes that say that the server, and not the client, is at fault, or gone."""
_VALUES: Final = (
    *(b"0", b"-1", b"1e400", b"-0.0", b"NaN", b"2147483648", b"18446744073709551616", b"9" * 5000, b"1.5"),
    *(b"null", b"true", b"{}", b"[]", b'""', b'"\\ud800"', b'"\\u0000"', b"[[[[]]]]", b'"' + b"x" * 40_000 + b'"'),
)
"""What stands in a body instead of one of its values."""
_VALUE: Final = re.compile(rb'"[^"]*"|-?\d+')


@dataclass(frozen=True)
class Seedling:
    """A request that mutants come from: of HTTP, with method, path and headers, or of gRPC, with a method alone."""

    grpc: bool
    method: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def seedlings() -> list[Seedling]:
    """Give all requests that have a body."""
    from google.protobuf.json_format import ParseDict  # noqa: PLC0415 - with the client, where mutants are made
    from tritonclient.grpc import service_pb2  # noqa: PLC0415

    found = []
    for call in http_calls(KEY):
        body = call.body if isinstance(call.body, bytes) else json.dumps(call.body).encode()
        if body:
            found.append(Seedling(grpc=False, method=call.method, path=call.path, body=body, headers=call.headers))
    for grpc_call in grpc_calls(KEY):
        kind = getattr(service_pb2, f"{grpc_call.method}Request", service_pb2.ModelInferRequest)
        for request in grpc_call.request if isinstance(grpc_call.request, list) else [grpc_call.request]:
            body = ParseDict(request, kind()).SerializeToString()
            found.append(Seedling(grpc=True, method=grpc_call.method, path="", body=body))
    return found


def mutant(seed: int, number: int, stock: list[Seedling]) -> Seedling:
    """Give the mutant of a number; it is the same each time."""
    chance = random.Random(f"{seed}-{number}")  # noqa: S311 - nothing is kept secret
    chosen = chance.choice(stock)
    body, headers, path = chosen.body, dict(chosen.headers), chosen.path
    for _ in range(chance.choice((1, 1, 2, 3, 5))):
        body = chance.choice(_CHANGES)(chance, body, chance.choice(stock).body)
    if not chosen.grpc:
        if chance.random() < 0.2:
            headers[HEADER_LENGTH] = chance.choice(("0", "-1", "9" * 400, "x", "", "1_0", str(chance.randrange(400))))
        if chance.random() < 0.1:
            headers["Content-Encoding"] = chance.choice(("gzip", "deflate", "br", "x" * 300))
            body = gzip.compress(body) if chance.random() < 0.5 else body
        if chance.random() < 0.1:
            path = chance.choice(("%00", "%ff", "..%2f", "x" * 2000, "1")).join(path.rpartition("demo")[::2])
    return Seedling(chosen.grpc, chosen.method, path, body, headers)


def _flip(chance: random.Random, body: bytes, _: bytes) -> bytes:
    changed = bytearray(body or b"\0")
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _overwrite(chance: random.Random, body: bytes, _: bytes) -> bytes:
    begin = chance.randrange(len(body) + 1)
    return body[:begin] + chance.randbytes(chance.randrange(1, 9)) + body[begin + chance.randrange(9) :]


def _cut(chance: random.Random, body: bytes, _: bytes) -> bytes:
    begin = chance.randrange(len(body) + 1)
    return body[:begin] if chance.random() < 0.5 else body[:begin] + body[begin + chance.randrange(1, 40) :]


def _repeat(chance: random.Random, body: bytes, _: bytes) -> bytes:
    begin = chance.randrange(len(body) + 1)
    part = body[begin : begin + chance.randrange(1, 60)]
    return body[:begin] + part * chance.choice((2, 3, 200)) + body[begin:]


def _splice(chance: random.Random, body: bytes, other: bytes) -> bytes:
    return body[: chance.randrange(len(body) + 1)] + other[chance.randrange(len(other) + 1) :]


def _replace(chance: random.Random, body: bytes, _: bytes) -> bytes:
    if not (values := list(_VALUE.finditer(body))):
        return body + chance.choice(_VALUES)
    value = chance.choice(values)
    return body[: value.start()] + chance.choice(_VALUES) + body[value.end() :]


_CHANGES: Final = (_flip, _overwrite, _cut, _repeat, _splice, _replace, _replace)


class Attack:
    """Mutants sent to one server, from several threads.

    Parameters
    ----------
    http_address, grpc_address
        Of the server.
    seed
        Of the mutants.

    """

    def __init__(self, http_address: str, grpc_address: str, seed: int) -> None:
        import grpc  # noqa: PLC0415

        self._http_address, self._seed = http_address, seed
        self._channel = grpc.insecure_channel(grpc_address)
        self._error = grpc.RpcError
        self._stock = seedlings()
        self._here = threading.local()

    def send(self, number: int) -> tuple[str, str | None]:
        """Send one mutant; give what came back, such as ``http 400``, and the body that made the server fail."""
        sent = mutant(self._seed, number, self._stock)
        answer, failed = self._over_grpc(sent) if sent.grpc else self._over_http(sent)
        return answer, f"{number}: {sent.method} {sent.path[:100]} {sent.body[:300]!r}" if failed else None

    def _over_http(self, sent: Seedling) -> tuple[str, bool]:
        connection = getattr(self._here, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection(self._http_address, timeout=_PATIENCE_S)
            self._here.connection = connection
        used = connection.sock is not None
        try:
            connection.request(sent.method, sent.path, sent.body, sent.headers)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self._here.connection = None
            if used:  # the server closes connections that have been idle for seconds: this one says nothing
                return self._over_http(sent)
            return f"http {type(error).__name__}", True
        return f"http {response.status}", response.status >= 500

    def _over_grpc(self, sent: Seedling) -> tuple[str, bool]:
        try:
            if sent.method == _STREAM:
                list(self._channel.stream_stream(_SERVICE + _STREAM)(iter([sent.body]), timeout=_PATIENCE_S))
            else:
                self._channel.unary_unary(_SERVICE + sent.method)(sent.body, timeout=_PATIENCE_S)
        except self._error as error:
            code: str = error.code().name
            return f"grpc {code}", code in _FAULTS
        return "grpc OK", False

    def send_all(self, numbers: Iterable[int]) -> tuple[Counter[str], list[str]]:
        """Send mutants; count the answers, and list the failures."""
        with ThreadPoolExecutor(_THREADS) as threads:
            results = list(threads.map(self.send, numbers))
        return Counter(answer for answer, _ in results), [failure for _, failure in results if failure]


def main() -> None:
    """Start a server, send mutants, write down what came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--afresh", action="store_true")
    given = parser.parse_args()
    state: dict[str, Any] = {"seed": given.seed, "sent": 0, "seconds": 0.0, "answers": {}, "failures": []}
    if RESULT.exists() and not given.afresh:
        before = json.loads(RESULT.read_text(encoding="utf-8"))
        state = before if before["seed"] == given.seed else state
    with tempfile.TemporaryDirectory() as home, Path(home, "log").open("w") as log:
        options = ["--port", "0", "--grpc-port", "0", "--allow-shared-memory", "--max-size", "64x64"]
        command = [sys.executable, "-m", "sdrt", "serve", "--bundle", "demo", "--backend", "onnxruntime", *options]
        environment = {**os.environ, "SDRT_HOME": home}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as server:
            try:
                _attack(server, state, given.count)
            finally:
                server.terminate()
        state["exit_code"] = server.returncode
    _write(state)
    print(json.dumps(state, indent=2))


def _attack(server: subprocess.Popen[str], state: dict[str, Any], count: int) -> None:
    assert server.stdout is not None
    match = re.fullmatch(r"serving demo on http://(\S+), gRPC on (\S+)\n", server.stdout.readline())
    assert match, "the server does not start"
    _wait_until_ready(match[1])
    attack, process = Attack(match[1], match[2], state["seed"]), psutil.Process(server.pid)
    while state["sent"] < count:
        began = time.monotonic()
        numbers = range(state["sent"], min(state["sent"] + _CHUNK, count))
        answers, failures = attack.send_all(numbers)
        state["answers"] = dict(sorted((Counter(state["answers"]) + answers).items()))
        state["failures"] += failures
        state["sent"] = numbers.stop
        state["seconds"] = round(state["seconds"] + time.monotonic() - began, 1)
        memory, kept = round(process.memory_info().rss / 1e6), state.setdefault("memory_mb", {})
        kept |= {"first": kept.get("first", memory), "most": max(kept.get("most", 0), memory), "last": memory}
        _write(state)
        print(f"{state['sent']} sent, {len(state['failures'])} failures, {state['seconds']:.0f} s", flush=True)
        if server.poll() is not None:
            sys.exit(f"the server has ended with {server.returncode}")
    _wait_until_ready(match[1])


def _wait_until_ready(address: str) -> None:
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=_PATIENCE_S).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
        else:
            return


def _write(state: dict[str, Any]) -> None:
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
