"""tritonclient over gRPC against the server: the same pictures, rules and limits as over HTTP."""

from __future__ import annotations

import asyncio
import queue
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import aio, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from .server import serving, until
from .test_life import failure
from .test_oip_http import drawn, inputs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import sdrt

    from .server import Server

ENDLESS = {"steps": 1000, "sampler": "ddpm"}
METHOD = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture
def client(inference_server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(inference_server.grpc) as opened:
        yield opened


@pytest.fixture(scope="module")
def narrow(home: Path) -> Iterator[Server]:
    """A server that makes one picture at a time, and lets one wait."""
    with serving(home, "--grpc-port", "0", "--at-once", "1", "--queue", "1") as running:
        yield running.wait_until_ready()


def refusal(call: Any) -> tuple[str, str]:
    """The code and the message with which a call is refused."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


def ignore(result: Any, error: Any) -> None:
    """For calls that are cancelled."""


def running(server: Server) -> float:
    return server.figure("sdrt_running_images")


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_the_pixels_are_those_of_the_pipeline(client: Any, pipe: sdrt.Pipeline, compression: str | None) -> None:
    asked = inputs(triton, negative_prompt="green", guidance_scale=7.1, sampler="euler")
    result = client.infer("demo", asked, request_id="first", compression_algorithm=compression)
    expected = drawn(pipe, negative_prompt="green", guidance_scale=7.1, sampler="euler")
    np.testing.assert_array_equal(result.as_numpy("image"), expected[None])
    assert result.as_numpy("seed").tolist() == [42]
    assert result.get_response().id == "first"
    only = client.infer("demo", asked, outputs=[triton.InferRequestedOutput("seed")])
    assert only.as_numpy("image") is None


def test_many_at_once(inference_server: Server, pipe: sdrt.Pipeline) -> None:
    async def ask() -> list[Any]:
        async with aio.InferenceServerClient(inference_server.grpc) as opened:
            return await asyncio.gather(*(opened.infer("demo", inputs(triton, seed=seed)) for seed in range(4)))

    for seed, result in enumerate(asyncio.run(ask())):
        np.testing.assert_array_equal(result.as_numpy("image"), drawn(pipe, seed=seed)[None])


def test_a_stream_answers_in_order_and_survives_errors(client: Any, pipe: sdrt.Pipeline) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(12):
        client.async_stream_infer("demo", inputs(triton, seed=number), request_id=str(number))
    client.async_stream_infer("other", inputs(triton))
    client.async_stream_infer("demo", inputs(triton, seed=99), request_id="last")
    for number in range(12):
        result, error = answers.get(timeout=60)
        assert error is None
        assert result.get_response().id == str(number)
        np.testing.assert_array_equal(result.as_numpy("image"), drawn(pipe, seed=number)[None])
    assert "there is no model 'other'" in str(answers.get(timeout=60)[1])
    assert answers.get(timeout=60)[0].get_response().id == "last"
    client.stop_stream()


def test_a_stream_that_is_broken_off_stops_its_work(inference_server: Server) -> None:
    with triton.InferenceServerClient(inference_server.grpc) as opened:
        opened.start_stream(ignore)
        opened.async_stream_infer("demo", inputs(triton, **ENDLESS))
        opened.async_stream_infer("demo", inputs(triton, **ENDLESS))
        until("both run", lambda: running(inference_server) == 2)
        opened.stop_stream(cancel_requests=True)
    until("they have stopped", lambda: running(inference_server) == 0, within_s=10)


def test_server_and_model_describe_themselves(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("demo", "1")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata().name == "sdrt"
    described = client.get_model_metadata("demo", as_json=True)
    assert described["inputs"][0] == {"name": "prompt", "datatype": "BYTES", "shape": ["-1"]}
    configuration = client.get_model_config("demo").config
    assert configuration.input[2].name == "steps"
    assert configuration.input[2].data_type == 8, "TYPE_INT32"
    assert configuration.input[2].optional
    assert configuration.instance_group[0].kind == 3, "KIND_MODEL"
    assert client.get_model_repository_index().models[0].state == "READY"
    before = client.get_inference_statistics("demo").model_stats[0]
    client.infer("demo", inputs(triton))
    after = client.get_inference_statistics().model_stats[0]
    assert after.inference_count == before.inference_count + 1
    assert after.inference_stats.success.count == before.inference_stats.success.count + 1
    assert refusal(lambda: client.load_model("demo"))[0] == "UNIMPLEMENTED"
    assert refusal(client.get_log_settings)[0] == "UNIMPLEMENTED"


def test_mistakes_are_refused_by_name(client: Any) -> None:
    code, message = refusal(lambda: client.infer("demo", inputs(triton, steps=0)))
    assert (code, message) == ("INVALID_ARGUMENT", "steps is 0: expected a whole number from 1 to 1000")
    assert refusal(lambda: client.infer("other", inputs(triton)))[0] == "NOT_FOUND"
    code, message = refusal(lambda: client.infer("demo", inputs(triton, prompt=["x" * 31_000] * 10, width=100)))
    assert (code, message.partition(":")[0]) == ("INVALID_ARGUMENT", "width is 100")


@pytest.mark.parametrize("compressed", [False, True])
def test_messages_are_limited(inference_server: Server, compressed: bool) -> None:
    """To a megabyte, also when inflated."""
    compression = grpc.Compression.Gzip if compressed else None
    before = inference_server.figure("process_resident_memory_bytes")
    with grpc.insecure_channel(inference_server.grpc, compression=compression) as channel:
        call = channel.unary_unary(METHOD)
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(200 << 20), timeout=60)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert inference_server.figure("process_resident_memory_bytes") - before < 100e6


@pytest.mark.parametrize("message", [b"\xff", b"\x0a\x02\xff\xfe", b"\x2a\x7f"])
def test_messages_that_are_none(inference_server: Server, message: bytes) -> None:
    with grpc.insecure_channel(inference_server.grpc) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(METHOD)(message, timeout=60)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "the message cannot be read: expected a ModelInferRequest"
        (answer,) = channel.stream_stream(METHOD.replace("ModelInfer", "ModelStreamInfer"))(iter([message]), timeout=60)
        assert b"the message cannot be read" in answer
    assert inference_server.grpc is not None
    host, _, port = inference_server.grpc.rpartition(":")
    with socket.create_connection((host, int(port))) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n" + message * 100)
        plain.settimeout(10)
        while plain.recv(4096):
            pass


def test_a_call_that_is_cancelled_stops_its_work(narrow: Server) -> None:
    with triton.InferenceServerClient(narrow.grpc) as opened:
        call = opened.async_infer("demo", inputs(triton, **ENDLESS), callback=ignore)
        until("it runs", lambda: running(narrow) == 1)
        call.cancel()
        until("it has stopped", lambda: running(narrow) == 0, within_s=10)
        assert (
            refusal(lambda: opened.infer("demo", inputs(triton, **ENDLESS), client_timeout=0.5))[0]
            == "DEADLINE_EXCEEDED"
        )
        until("it has stopped as well", lambda: running(narrow) == 0, within_s=10)
    steps = narrow.figure("sdrt_steps_total")
    time.sleep(0.2)
    assert narrow.figure("sdrt_steps_total") == steps
    assert 'sdrt_grpc_requests_total{code="CANCELLED",method="ModelInfer"}' in narrow.get("/metrics")[1]


def test_a_full_queue_says_when_to_come_back(narrow: Server) -> None:
    with grpc.insecure_channel(narrow.grpc) as channel, triton.InferenceServerClient(narrow.grpc) as opened:
        for what in ("one runs", "one waits"):
            opened.async_infer("demo", inputs(triton, **ENDLESS), callback=ignore)
            until(what, lambda: running(narrow) == 1)
        until("the second one waits", lambda: narrow.figure("sdrt_queue_depth") == 1)
        request = service_pb2.ModelInferRequest(model_name="demo")
        with pytest.raises(grpc.RpcError) as caught:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 1 <= int(dict(caught.value.trailing_metadata())["retry-after"]) <= 600
    until("all have stopped", lambda: running(narrow) + narrow.figure("sdrt_queue_depth") == 0, within_s=10)


def test_sigterm_lets_it_answer_what_it_has_accepted(home: Path) -> None:
    with serving(home, "--grpc-port", "0", "--at-once", "1") as server, ThreadPoolExecutor(3) as threads:
        server.wait_until_ready()
        with triton.InferenceServerClient(server.grpc) as opened:
            accepted = [threads.submit(opened.infer, "demo", inputs(triton, steps=12)) for _ in range(3)]
            until("one runs, two wait", lambda: running(server) + server.figure("sdrt_queue_depth") == 3)
            server.process.send_signal(signal.SIGTERM)
            until("it is draining", lambda: not opened.is_server_ready(), within_s=10)
            assert refusal(lambda: opened.infer("demo", inputs(triton)))[0] == "UNAVAILABLE"
            pictures = [each.result().as_numpy("image") for each in accepted]
        np.testing.assert_array_equal(pictures[0], pictures[2])
        assert server.process.wait(30) == 0


def test_a_key_is_asked_for(home: Path) -> None:
    with serving(home, "--grpc-port", "0", "--host", "0.0.0.0", SDRT_API_KEY="open-sesame") as locked:
        assert locked.grpc is not None
        with triton.InferenceServerClient(locked.grpc.replace("0.0.0.0", "127.0.0.1")) as opened:
            assert opened.is_server_live()
            for headers in ({}, {"authorization": "Bearer open-sesam"}, {"authorization": "open-sesame"}):
                code, message = refusal(lambda headers=headers: opened.get_model_metadata("demo", headers=headers))
                assert (code, message.partition(":")[0]) == ("UNAUTHENTICATED", "the key is missing or wrong")
                assert refusal(lambda headers=headers: opened.infer("demo", inputs(triton), headers=headers))[0] == code
            key = {"authorization": "Bearer open-sesame"}
            assert opened.get_model_metadata("demo", headers=key).name == "demo"
            until("it is ready", opened.is_server_ready)
            assert opened.infer("demo", inputs(triton), headers=key).as_numpy("image").shape == (1, 128, 128, 3)


def test_ports_that_cannot_be_had(home: Path, inference_server: Server) -> None:
    assert inference_server.grpc is not None
    port = inference_server.grpc.rpartition(":")[2]
    expected = f"port {port} of 127.0.0.1 is taken: choose another with --grpc-port"
    assert failure(home, "--grpc-port", port) == (1, expected)
    assert failure(home, "--uds", "x.sock", "--grpc-port", "0") == (
        2,
        "--uds and --grpc-port exclude each other: give one",
    )


def test_without_the_extra(home: Path, tmp_path: Path) -> None:
    """An interpreter that finds no grpc; without --grpc-port it need not."""
    (tmp_path / "grpc.py").write_text("raise ModuleNotFoundError(\"No module named 'grpc'\", name='grpc')")
    line = "grpc is not installed and sdrt serve needs it: run pip install 'sdrt[serve]'"
    assert failure(home, "--grpc-port", "0", PYTHONPATH=str(tmp_path)) == (1, line)
    with serving(home, PYTHONPATH=str(tmp_path)) as server:
        assert server.get("/v2/health/live")[0] == 200
