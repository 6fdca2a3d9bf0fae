"""A server that is ended, whose clients go away, and whose parent dies; again and again."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import psutil
from tests.serve.server import COMMAND, PATIENCE_S, Server, environment, serving, until

from bench.serve_clients import GENERATIONS, NONE_CAME, UNCONNECTED, Crowd, Order, spread
from bench.serve_load import AT_ONCE, REFUSALS, orders

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

Round = dict[str, Any]

CLIENTS_PER_S: Final = 25.0
PLACES: Final = 8
_UNHEARD_S = 0.5
LOADING_EVERY: Final = 10
"""One in so many signals comes while the models are being loaded."""


def resumed(journal: Path, rounds: int, make: Callable[[int], Round]) -> list[Round]:
    """Make the rounds that a journal does not have yet, noting each as it ends, and give all."""
    made = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    with journal.open("a") as file:
        for number in range(len(made), rounds):
            made.append(make(number))
            print(f"{journal.stem} {number + 1} of {rounds}: {made[-1]}", flush=True)
            file.write(json.dumps(made[-1]) + "\n")
            file.flush()
    return made[:rounds]


def sigterm(home: Path, *, signals: int) -> dict[str, Any]:
    """Send SIGTERM at random moments to servers that are asked more than they can do."""
    asked = [order for steps in (4, 8, 20) for order in orders(home, 8, num_inference_steps=steps)]
    made = resumed(home / "sigterm.jsonl", signals, partial(_end_under_load, home, asked))
    total: Counter[str] = Counter()
    for each in made:
        total.update(each["requests"])
    return {
        "signals": len(made),
        "of these while loading": sum(each["loading"] for each in made),
        "exit codes": dict(Counter(str(each["code"]) for each in made)),
        "requests": dict(total),
        "seconds to exit, median and most": _middle_and_most([each["seconds"] for each in made]),
    }


def _end_under_load(home: Path, asked: Sequence[Order], number: int) -> Round:
    draw = random.Random(number)  # noqa: S311 - moments, and no secret
    loading = number % LOADING_EVERY == LOADING_EVERY - 1
    options = ("--at-once", str(AT_ONCE), "--queue", str(PLACES), "--log-format", "json")
    with serving(home, *options) as server:
        if not loading:
            server.wait_until_ready()
        crowd = Crowd(server.url, asked)
        seconds, code = asyncio.run(_signal(server, crowd, draw.uniform(0, 0.3 if loading else 2), number))
        logged = Counter(each["status"] for each in server.log() if each.get("path") == GENERATIONS)
    found = Counter(each.status for each in crowd.answers)
    exact = sum(each.exact for each in crowd.answers)
    requests = {
        "accepted": logged[200],
        "answered with the exact picture": exact,
        "refused": sum(found[status] for status in REFUSALS),
        "not read before the end": found[NONE_CAME],
        "came after the end": found[UNCONNECTED],
    }
    # What the server has taken and what clients were given, each request once.
    known = {200, *REFUSALS}
    if found[200] != exact or any(found[status] != logged[status] for status in known | set(logged)):
        raise RuntimeError(
            f"round {number}: clients got {dict(found)}, {exact} exact; the server tells of {dict(logged)}"
        )
    return {"loading": loading, "code": code, "seconds": round(seconds, 2), "requests": requests}


async def _signal(server: Server, crowd: Crowd, moment: float, seed: int) -> tuple[float, int]:
    """Send the signal after so many seconds of load, which goes on until the server has ended."""
    load = asyncio.create_task(crowd.open(CLIENTS_PER_S, PATIENCE_S, seed))
    await asyncio.sleep(moment)
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code = await asyncio.to_thread(server.process.wait, PATIENCE_S)
    seconds = time.monotonic() - began
    await load
    return seconds, code


def _middle_and_most(seconds: Sequence[float]) -> list[float]:
    ordered = sorted(seconds)
    return [ordered[len(ordered) // 2], ordered[-1]]


def disconnect(home: Path, *, disconnects: int) -> dict[str, Any]:
    """Let clients go away at random moments, and see that their work stops, nothing leaks, and others are served."""
    draw = random.Random(0)  # noqa: S311 - moments, and no secret
    (probe,) = orders(home, 1, num_inference_steps=4)
    beyond_leaving: Counter[float] = Counter()
    beyond_knowing: Counter[float] = Counter()
    stopped: list[float] = []
    held: list[dict[str, float]] = []
    gone = exact = 0
    known = 0.0
    with serving(home, "--at-once", str(AT_ONCE)) as server:
        server.wait_until_ready()
        process = psutil.Process(server.process.pid)
        while gone < disconnects:
            leaving = [_Leaving(server, draw) for _ in range(draw.choice((1, 1, 1, 2, 6)))]
            for each in sorted(leaving, key=lambda each: each.moment):
                each.leave()
            gone += len(leaving)
            began = time.monotonic()
            at_leaving = at_knowing = figures = _figures(server)
            # Of a connection that is reset the server may never hear.
            while figures["gone"] < known + len(leaving) and time.monotonic() < began + _UNHEARD_S:
                at_knowing = figures = _figures(server)
            while figures["at work"]:
                figures = _figures(server)
            if figures["gone"] == known + len(leaving):
                stopped.append(time.monotonic() - began)
            known = figures["gone"]
            # Half a request is none, and of a crowd as many are made as can be at once.
            allowed = min(sum(each.pictures for each in leaving), AT_ONCE)
            for before, beyond in ((at_leaving, beyond_leaving), (at_knowing, beyond_knowing)):
                beyond[max(0, figures["steps"] - before["steps"] - allowed)] += 1
            exact += _is_exact(server, probe)
            held.append(_held(process))
            if len(held) % 50 == 0:
                print(f"disconnect {gone} of {disconnects}: {held[-1]}", flush=True)
        if "Traceback" in server.errors():
            raise RuntimeError(f"the server's log has tracebacks: {server.errors()}")
    return {
        "disconnects": gone,
        "rounds": len(held),
        "rounds by steps beyond one a picture, after the last had left": _by_number(beyond_leaving),
        "rounds by steps beyond one a picture, after the server knew": _by_number(beyond_knowing),
        "ms until all had stopped, where the server heard of all": spread(stopped),
        "rounds after which a picture was exact": exact,
        "held after each tenth": held[max(0, len(held) // 10 - 1) :: max(1, len(held) // 10)],
    }


def _figures(server: Server) -> dict[str, float]:
    """Read what is needed of the metrics, all of one moment: the pictures at work, their steps, and who went away."""
    text = server.get("/metrics")[1]
    gone = rf'^sdrt_http_requests_total{{.*route="{GENERATIONS}",status="499"}} (\S+)$'
    patterns = {"at work": r"^sdrt_running_images (\S+)$", "steps": r"^sdrt_steps_total{.*} (\S+)$", "gone": gone}
    return {name: sum(map(float, re.findall(each, text, re.MULTILINE))) for name, each in patterns.items()}


def _by_number(counted: Counter[float]) -> dict[str, int]:
    return {f"{number:g}": times for number, times in sorted(counted.items())}


class _Leaving:
    """A client that has asked for more than it will wait for, and how and when it goes away."""

    def __init__(self, server: Server, draw: random.Random) -> None:
        stream = draw.random() < 0.5
        count = draw.choice((1, 1, 2, 4))
        body = {
            "prompt": "a red star",
            "size": "256x256",
            "num_inference_steps": 1000,
            "sampler": "ddpm",
            **({"stream": True, "partial_images": 3} if stream else {"n": count}),
        }
        request = Order(body, "").encoded()
        whole = draw.random() < 0.9
        self.pictures = (1 if stream else count) if whole else 0
        self.moment = time.monotonic() + draw.choice((0.0, 0.02, 0.4)) * draw.random()
        self._abrupt = draw.random() < 0.5
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.sendall(request if whole else request[: draw.randrange(1, len(request))])

    def leave(self) -> None:
        """Close the connection at the moment that was drawn, either properly or by a reset."""
        time.sleep(max(0.0, self.moment - time.monotonic()))
        if self._abrupt:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


def _is_exact(server: Server, order: Order) -> bool:
    crowd = Crowd(server.url, [order])
    asyncio.run(crowd.ask(0, time.monotonic()))
    (answer,) = crowd.answers
    return answer.exact


def _held(process: psutil.Process) -> dict[str, float]:
    with process.oneshot():
        megabytes = round(process.memory_info().rss / 1e6, 1)
        return {"threads": process.num_threads(), "descriptors": process.num_fds(), "MB": megabytes}


PARENT: Final = """
import os, subprocess, sys
server = subprocess.Popen([*sys.argv[1:], "--parent", str(os.getpid())])
print(server.pid, flush=True)
server.wait()
"""
_MOMENTS = ("loading", "ready", "at work")


def parent(home: Path, *, deaths: int) -> dict[str, Any]:
    """Kill the process that has started a server on a Unix socket, and see how long the server outlives it."""
    made = resumed(home / "parent.jsonl", deaths, partial(_orphan, home))
    return {
        "deaths": len(made),
        "sockets left behind": sum(each["socket left"] for each in made),
        "seconds that the server lived on, median and most": {
            moment: _middle_and_most([each["seconds"] for each in made if each["moment"] == moment])
            for moment in _MOMENTS
            if any(each["moment"] == moment for each in made)
        },
    }


def _orphan(home: Path, number: int) -> Round:
    draw = random.Random(number)  # noqa: S311 - moments, and no secret
    moment = _MOMENTS[number % len(_MOMENTS)]
    path = home / "parent.sock"
    command = [sys.executable, "-c", PARENT, *COMMAND, "--bundle", "demo", "--uds", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(home)) as process:
        assert process.stdout is not None
        server = os.pidfd_open(int(process.stdout.readline()))
        if moment == "loading":
            time.sleep(draw.uniform(0, 2))
        else:
            until("it is ready", lambda: path.exists() and _status(path, "GET /readyz") == http.HTTPStatus.OK)
        with closing(socket.socket(socket.AF_UNIX)) as connection:
            if moment == "at work":
                connection.connect(str(path))
                connection.sendall(
                    Order({"prompt": "a star", "num_inference_steps": 1000, "sampler": "ddpm"}, "").encoded()
                )
                time.sleep(draw.uniform(0.1, 0.4))
            process.kill()
            began = time.monotonic()
            ended = select.poll()
            ended.register(server, select.POLLIN)
            if not ended.poll(1000 * PATIENCE_S):
                raise RuntimeError(f"round {number}: the server lives on after its parent's end, while {moment}")
            seconds = time.monotonic() - began
        os.close(server)
    return {"moment": moment, "seconds": round(seconds, 3), "socket left": path.exists()}


def _status(path: Path, request: str) -> int:
    """Give the status of a request without a body over a Unix socket; `NONE_CAME` if nobody listens yet."""
    with closing(socket.socket(socket.AF_UNIX)) as connection:
        try:
            connection.connect(str(path))
        except ConnectionRefusedError:
            return NONE_CAME
        connection.sendall(f"{request} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return int(connection.makefile("rb").readline().split()[1])
