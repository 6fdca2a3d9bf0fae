"""The HTTP side as curl sees it: health, the document, limits, keys."""

from __future__ import annotations

import asyncio
import json
import subprocess
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openapi_spec_validator import validate
from starlette.requests import Request

from sdrt.serve import http

from .server import PATIENCE_S, serving, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .server import Server

GENERATIONS = "/v1/images/generations"
JSON = ("-H", "Content-Type: application/json")


def curl(server: Server, path: str, *options: str, stdin: bytes | None = None) -> tuple[int, dict[str, str], Any]:
    """Status, headers with small letters, and the body, read if it is JSON."""
    command = ["curl", "-sS", "--max-time", "60", "-D", "-", *options, server.url + path]
    done = subprocess.run(command, capture_output=True, input=stdin, check=True, timeout=90)
    *_, head, body = done.stdout.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").split(b"\r\n\r\n", 1)
    status, *lines = head.decode().splitlines()
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    kind = headers.get("content-type", "")
    return int(status.split()[1]), headers, json.loads(body) if kind == "application/json" else body.decode()


def test_health(server: Server) -> None:
    status, headers, body = curl(server, "/healthz")
    assert (status, body) == (200, {"status": "ok"})
    assert len(headers["x-request-id"]) == 32
    status, _, body = curl(server, "/readyz")
    assert (status, body) == (200, {"status": "ready", "models": [{"id": "demo", "shares_steps": True}]})


def test_the_document_is_valid_and_complete(server: Server) -> None:
    _, _, document = curl(server, "/openapi.json")
    validate(document)
    assert document["openapi"] == "3.1.0"
    paths = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/models", "/v1/models/{model}", GENERATIONS}
    paths |= {"/", "/native/v1/generate", "/native/v1/models"}
    assert {path for path in document["paths"] if not path.startswith("/v2")} == paths
    operation = document["paths"][GENERATIONS]["post"]
    fields = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"prompt", "seed", "negative_prompt", "num_inference_steps", "guidance_scale", "sampler"} <= set(fields)
    assert {"200", "400", "404", "408", "413", "415", "429", "500", "503"} <= set(operation["responses"])


def test_figures(server: Server) -> None:
    curl(server, GENERATIONS, *JSON, "-d", '{"prompt": "a star", "num_inference_steps": 3, "sampler": "ddim"}')
    _, headers, text = curl(server, "/metrics")
    assert headers["content-type"].startswith("text/plain")
    for phase in ("queue", "prepare", "denoise", "decode", "encode"):
        assert f'sdrt_phase_seconds_count{{model="demo",phase="{phase}"}}' in text
    for name in ("sdrt_queue_depth", "sdrt_batch_images_sum", "sdrt_steps_per_second", "process_resident_memory_bytes"):
        assert f"\n{name} " in text
    assert f'sdrt_http_requests_total{{method="POST",route="{GENERATIONS}",status="200"}}' in text
    assert server.figure("sdrt_steps_total") >= 3


def test_the_log_is_json(server: Server) -> None:
    _, headers, _ = curl(server, "/no/such\x1b[31m".replace("\x1b", "%1b").replace("[", "%5b"))
    number = headers["x-request-id"]
    until("it is logged", lambda: any(each.get("request_id") == number for each in server.log()))
    (entry,) = [each for each in server.log() if each.get("request_id") == number]
    assert entry["level"] == "info"
    assert (entry["method"], entry["path"], entry["status"]) == ("GET", "/no/such\x1b[31m", 404)
    assert 0 < entry["seconds"] < PATIENCE_S


@pytest.mark.parametrize(
    ("path", "options", "status", "message"),
    [
        ("/v1", (), 404, "there is nothing at '/v1': /openapi.json lists what there is"),
        ("/v1/models/", (), 404, "there is nothing at '/v1/models/'"),
        ("/v1/models/..%2f..%2fetc%2fpasswd", (), 404, "etc/passwd"),
        (GENERATIONS, (), 405, "Method Not Allowed"),
        ("/healthz", ("-X", "POST"), 405, "Method Not Allowed"),
        (GENERATIONS, ("-d", "prompt=star"), 415, "expected application/json"),
        (GENERATIONS, (*JSON, "-d", "{"), 400, "the body is no JSON"),
        (GENERATIONS, (*JSON, "-d", "[]"), 400, "the body is []: expected an object"),
        (GENERATIONS, (*JSON, "-d", "{}"), 400, "prompt is missing: expected a string"),
        (GENERATIONS, (*JSON, "-d", '{"prompt": "a", "guidance_scale": NaN}'), 400, "NaN is no JSON"),
        (GENERATIONS, (*JSON, "-d", "[" * 100_000), 400, "nested too deeply"),
        (GENERATIONS, (*JSON, "-d", '{"prompt": "\\ud800"}'), 400, "half a surrogate pair"),
        (GENERATIONS, (*JSON, "-d", '{"prompt": "a", "sampler": "\\ud800"}'), 400, "sampler is '\\ud800'"),
        (GENERATIONS, (*JSON, "-d", '{"prompt": "\xff"}'), 400, None),
        ("/healthz", ("-H", "Host: evil.example"), 403, "this server is not called so: expected one of 127.0.0.1"),
    ],
)
def test_errors_have_one_form(
    server: Server, path: str, options: tuple[str, ...], status: int, message: str | None
) -> None:
    if message is None:
        found, _, body = curl(server, path, *JSON, "--data-binary", "@-", stdin=b'{"prompt": "\xff"}')
        message = "the body is no JSON"
    else:
        found, _, body = curl(server, path, *options)
    assert found == status
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert message in body["error"]["message"]


@pytest.mark.parametrize("how", [("-H", "Transfer-Encoding: chunked"), ("-H", "Expect:")], ids=["chunked", "declared"])
def test_bodies_are_limited(server: Server, how: tuple[str, ...]) -> None:
    body = json.dumps({"prompt": "x" * 2_000_000}).encode()
    status, _, answer = curl(server, GENERATIONS, *JSON, *how, "--data-binary", "@-", stdin=body)
    assert status == 413
    assert "expected at most 1048576 bytes" in answer["error"]["message"]


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends half of it and then nothing is told so, rather than kept."""
    monkeypatch.setattr(http, "BODY_PATIENCE_S", 0.05)
    parts = iter([{"type": "http.request", "body": b'{"prompt"', "more_body": True}])

    async def receive() -> Any:
        if (part := next(parts, None)) is None:
            await asyncio.Event().wait()
        return part

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(http.RefusalError, match=r"did not come within 0\.05 seconds") as caught:
        asyncio.run(http.read_object(Request(scope, receive), {"type": "object", "properties": {}}, {}))
    assert caught.value.status == 408


@pytest.fixture(scope="module")
def locked(home: Path) -> Iterator[Server]:
    """A server that other machines reach."""
    with serving(home, "--host", "0.0.0.0", SDRT_API_KEY="open-sesame") as running:
        running.url = running.url.replace("0.0.0.0", "127.0.0.1")
        yield running


def test_a_key_is_asked_for(locked: Server) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere", GENERATIONS):
        status, headers, body = curl(locked, path)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
    assert curl(locked, "/healthz")[0] == 200
    for wrong in ("open-sesam", "open-sesame2", "\xff"):
        with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
            locked.client(wrong).models.list()
    assert [model.id for model in locked.client("open-sesame").models.list()] == ["demo"]
    _, _, document = curl(locked, "/openapi.json", "-H", "Authorization: bearer open-sesame")
    validate(document)
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/healthz"]["get"]
    assert curl(locked, "/healthz", "-H", "Host: gpu-server.example:7860")[0] == 200, "the key is what keeps it safe"


def test_while_models_are_loaded(locked: Server, home: Path) -> None:
    """What is asked before that is told to come back."""
    with serving(home) as running:
        status, headers, body = curl(running, GENERATIONS, *JSON, "-d", '{"prompt": "a star"}')
        ready, _, state = curl(running, "/readyz")
        assert curl(running, "/healthz")[0] == 200
        # Loading takes seconds, and these three calls a tenth of one.
        assert (status, body["error"]["code"]) == (503, "loading")
        assert int(headers["retry-after"]) > 0
        assert (ready, state["status"]) == (503, "loading")
        running.wait_until_ready()
