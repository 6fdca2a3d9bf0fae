"""How a server begins and ends, and what it does when there is too much to do or nobody who waits."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import openai
import pytest

from sdrt.engines import demo

from .server import COMMAND, PATIENCE_S, Server, environment, serving, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ENDLESS = {"num_inference_steps": 1000, "sampler": "ddpm"}
SHORT = {"num_inference_steps": 4, "seed": 1}
PROMPT = "a red star"


@pytest.fixture(scope="module")
def narrow(home: Path) -> Iterator[Server]:
    """A server that makes one picture at a time, and lets one wait."""
    with serving(home, "--at-once", "1", "--queue", "1") as running:
        yield running.wait_until_ready()


@contextmanager
def asking(server: Server, **body: Any) -> Iterator[http.client.HTTPConnection]:
    """Send a request and do not wait for its answer; the connection is closed at the end."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE_S)
    text = json.dumps({"prompt": PROMPT, **body})
    connection.request("POST", "/v1/images/generations", text, {"Content-Type": "application/json"})
    try:
        yield connection
    finally:
        connection.close()


def running(server: Server) -> float:
    return server.figure("sdrt_running_images")


@pytest.mark.parametrize("stream", [False, True], ids=["answer", "stream"])
def test_work_stops_within_a_step_of_its_client(narrow: Server, stream: bool) -> None:
    with asking(narrow, **ENDLESS, stream=stream):
        until("it runs", lambda: narrow.figure("sdrt_steps_per_second") > 0.2 and running(narrow) == 1)
    until("it has stopped", lambda: running(narrow) == 0, within_s=10)
    steps = narrow.figure("sdrt_steps_total")
    time.sleep(0.2)
    assert narrow.figure("sdrt_steps_total") == steps
    assert narrow.figure("sdrt_queue_depth") == 0


def test_a_client_that_leaves_in_the_middle_of_its_request(narrow: Server) -> None:
    def gone() -> float:
        return narrow.figure('sdrt_http_requests_total{method="POST",route="/v1/images/generations",status="499"}')

    before = gone()
    with socket.create_connection(("127.0.0.1", int(narrow.url.rpartition(":")[2]))) as client:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f'{head}Content-Length: 100\r\n\r\n{{"prompt": "a st'.encode())
    until("it is counted as one that went away", lambda: gone() == before + 1)
    assert "Traceback" not in narrow.errors()


def test_a_full_queue_says_when_to_come_back(narrow: Server) -> None:
    with asking(narrow, **ENDLESS):
        until("the first one runs", lambda: running(narrow) == 1)
        with asking(narrow, **ENDLESS):
            until("the second one waits", lambda: narrow.figure("sdrt_queue_depth") == 1)
            began = time.monotonic()
            with pytest.raises(openai.RateLimitError) as caught:
                narrow.client().images.generate(prompt=PROMPT)
            assert time.monotonic() - began < 5
            assert caught.value.code == "queue_full"
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 600
        until("the place is free", lambda: narrow.figure("sdrt_queue_depth") == 0, within_s=10)
    assert narrow.client().images.generate(prompt=PROMPT, extra_body=SHORT).data


def test_more_at_once_than_there_are_places(narrow: Server) -> None:
    with pytest.raises(openai.RateLimitError):
        narrow.client().images.generate(prompt=PROMPT, n=3, extra_body=SHORT)
    assert len(narrow.client().images.generate(prompt=PROMPT, n=2, extra_body=SHORT).data or []) == 2


def test_one_of_several_leaves_and_the_others_get_their_pictures(server: Server) -> None:
    def ask(seed: int) -> str:
        body = {"num_inference_steps": 16, "seed": seed}
        response = server.client().images.generate(prompt=PROMPT, extra_body=body)
        assert response.data
        return response.data[0].b64_json or ""

    alone = [ask(seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as threads, asking(server, num_inference_steps=16) as leaving:
        others = threads.map(ask, (1, 2))
        until("all run", lambda: running(server) == 3)
        leaving.close()
        assert list(others) == alone
    until("all have ended", lambda: running(server) == 0, within_s=10)


def test_sigterm_lets_it_answer_what_it_has_accepted(home: Path) -> None:
    with serving(home, "--at-once", "1") as server, ThreadPoolExecutor(4) as threads:
        server.wait_until_ready()
        client = server.client()
        # Opened now, since nothing is known of a connection that comes later than the signal.
        waiting = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE_S)
        waiting.connect()

        def ask(_: int) -> bytes:
            response = client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 12, "seed": 1})
            assert response.data
            return base64.b64decode(response.data[0].b64_json or "")

        accepted = [threads.submit(ask, number) for number in range(4)]
        until("one runs and the others wait", lambda: running(server) + server.figure("sdrt_queue_depth") == 4)
        server.process.send_signal(signal.SIGTERM)
        until("it is draining", lambda: server.get("/readyz")[0] == 503, within_s=10)
        assert json.loads(server.get("/readyz")[1])["status"] == "draining"
        body = json.dumps({"prompt": PROMPT})
        waiting.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        late = waiting.getresponse()
        assert (late.status, json.load(late)["error"]["code"]) == (503, "draining")
        assert late.headers["retry-after"]
        assert len({answer.result() for answer in accepted}) == 1
        assert server.process.wait(30) == 0
    with pytest.raises(OSError):
        server.get("/healthz")


def test_sigterm_while_models_are_loaded(home: Path) -> None:
    with serving(home) as server:
        assert server.get("/readyz")[0] == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.errors()


def test_a_second_signal_does_not_wait(home: Path) -> None:
    with serving(home) as server:
        server.wait_until_ready()
        with asking(server, **ENDLESS):
            until("it runs", lambda: running(server) == 1)
            server.process.send_signal(signal.SIGINT)
            until("it is draining", lambda: server.get("/readyz")[0] == 503, within_s=10)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(10) == 1
        assert "ended before all was answered" in server.errors()


def test_a_unix_socket_is_for_its_user_alone_and_goes_with_its_parent(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "sdrt.sock"
    abandoned = socket.socket(socket.AF_UNIX)
    abandoned.bind(str(path))
    abandoned.close()
    command = [sys.executable, "-c", "input()"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE) as parent,
        serving(home, "--uds", str(path), "--parent", str(parent.pid)) as server,
    ):
        assert server.url == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        command = ["curl", "-sS", "--unix-socket", str(path), "http://sdrt/healthz"]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
        assert json.loads(done.stdout) == {"status": "ok"}
        assert failure(home, "--uds", str(path)) == (
            1,
            f"another server listens on {path}: choose another path, or end it",
        )
        parent.kill()
        parent.wait()
        server.process.wait(5)
        assert not path.exists()


def test_a_parent_that_has_ended_already(home: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as parent:
        parent.wait()
    command = [*COMMAND, "--bundle", "demo", "--port", "0", "--parent", str(parent.pid)]
    done = subprocess.run(command, capture_output=True, env=environment(home), check=False, timeout=PATIENCE_S)
    assert done.returncode == 1


def failure(home: Path, *options: str, bundle: str = "demo", **more: str) -> tuple[int, str]:
    """Run a command that must end in one line on standard error and nothing on standard output."""
    port = () if {"--port", "--uds"} & set(options) else ("--port", "0")
    command = [*COMMAND, "--bundle", bundle, *port, *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(home, **more), check=False, timeout=PATIENCE_S
    )
    assert done.stdout == ""
    assert done.stderr.startswith("sdrt: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr.removeprefix("sdrt: ").strip()


def test_a_port_that_is_taken(home: Path, server: Server) -> None:
    port = server.url.rpartition(":")[2]
    assert failure(home, "--port", port) == (1, f"port {port} of 127.0.0.1 is taken: choose another with --port")


def test_other_machines_need_a_key(home: Path) -> None:
    code, line = failure(home, "--host", "0.0.0.0")
    assert code == 2
    assert line.startswith("0.0.0.0 lets other machines in: set SDRT_API_KEY")
    assert failure(home, "--host", "no.such.host.invalid")[0] == 2
    assert failure(home, "--port", "0", SDRT_API_KEY="with space")[0] == 2


def test_a_bundle_that_is_not_there_or_broken(home: Path, tmp_path: Path) -> None:
    assert "there is no bundle 'nothing'" in failure(home, bundle="nothing")[1]
    (tmp_path / "bundle.json").write_text("{}")
    assert failure(home, bundle=str(tmp_path))[0] == 1
    code, line = failure(home, "--bundle", "demo")
    assert code == 2
    assert "are both called 'demo'" in line


def test_a_bundle_that_turns_out_to_be_damaged(home: Path, tmp_path: Path) -> None:
    """Weights are read only when the server listens already; it ends then, and says why in one line."""
    folder = tmp_path / "damaged"
    shutil.copytree(demo.bundle_folder(home), folder)
    weights = max(folder.glob("*unet*"), key=lambda file: file.stat().st_size)
    with weights.open("r+b") as file:
        file.write(b"\0damage")
    with serving(home, bundle=str(folder)) as server:
        assert server.process.wait(PATIENCE_S) == 1
        (line,) = server.errors().splitlines()
    assert weights.name in line


def test_a_path_that_cannot_be_a_socket(home: Path, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("mine")
    assert failure(home, "--uds", str(taken)) == (1, f"{taken} exists and is no socket: choose another path")
    assert taken.read_text() == "mine"
    assert "choose another path" in failure(home, "--uds", str(tmp_path / ("x" * 120)))[1]
    assert failure(home, "--uds", "x.sock", "--port", "1")[0] == 2


def test_without_the_extra(home: Path, tmp_path: Path) -> None:
    """An interpreter that finds no uvicorn."""
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(\"No module named 'uvicorn'\", name='uvicorn')")
    before = os.environ.get("PYTHONPATH")
    code, line = failure(home, PYTHONPATH=os.pathsep.join(filter(None, (str(tmp_path), before))))
    assert code == 1
    assert line == "uvicorn is not installed and sdrt serve needs it: run pip install 'sdrt[serve]'"
