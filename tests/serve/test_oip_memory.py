"""tritonclient's shared memory against the server, over HTTP and gRPC."""

from __future__ import annotations

import base64
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, serialize_byte_tensor, shared_memory

from .server import until
from .test_http import curl
from .test_oip_http import arrays, drawn, inputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sdrt

    from .server import Server

PIXELS = 128 * 128 * 3


@pytest.fixture(params=["http", "grpc"])
def library(request: pytest.FixtureRequest) -> Any:
    return getattr(tritonclient, request.param)


@pytest.fixture
def client(inference_server: Server, library: Any) -> Iterator[Any]:
    http = library is tritonclient.http
    address = inference_server.url.removeprefix("http://") if http else inference_server.grpc
    with library.InferenceServerClient(address) as opened:
        yield opened
        opened.unregister_system_shared_memory()


@contextmanager
def region(client: Any, name: str, size: int) -> Iterator[tuple[Any, str]]:
    """Make a region with tritonclient, and register it; gives its handle and its key."""
    key = f"/sdrt-{secrets.token_hex(8)}"
    handle = shared_memory.create_shared_memory_region(name, key, size)
    try:
        client.register_system_shared_memory(name, key, size)
        yield handle, key
    finally:
        shared_memory.destroy_shared_memory_region(handle)


def refusal(call: Any) -> str:
    with pytest.raises(InferenceServerException) as caught:
        call()
    message: str = caught.value.message()
    return message


def test_tensors_come_and_go_through_shared_memory(client: Any, library: Any, pipe: sdrt.Pipeline) -> None:
    given = {name: array for name, (_, array) in arrays(guidance_scale=7.1).items()}
    parts = {
        name: serialize_byte_tensor(array) if array.dtype == np.object_ else array for name, array in given.items()
    }
    sizes = {name: len(part.item()) if part.dtype == np.object_ else part.nbytes for name, part in parts.items()}
    with region(client, "in", 4096) as (source, _), region(client, "out", 2 * PIXELS) as (target, _):
        asked, offset = [], 0
        for tensor in inputs(library, guidance_scale=7.1):
            shared_memory.set_shared_memory_region(source, [parts[tensor.name()]], offset)
            tensor.set_shared_memory("in", sizes[tensor.name()], offset)
            asked.append(tensor)
            offset += sizes[tensor.name()]
        image, seed = (library.InferRequestedOutput(name) for name in ("image", "seed"))
        image.set_shared_memory("out", PIXELS, offset=100)
        seed.set_shared_memory("out", 8)
        result = client.infer("demo", asked, outputs=[image, seed])
        pixels = shared_memory.get_contents_as_numpy(target, np.uint8, [1, 128, 128, 3], offset=100)
        np.testing.assert_array_equal(pixels, drawn(pipe, guidance_scale=7.1)[None])
        assert shared_memory.get_contents_as_numpy(target, np.int64, [1]).tolist() == [42]
        beyond = shared_memory.get_contents_as_numpy(target, np.uint8, [PIXELS - 100], offset=100 + PIXELS)
        assert not beyond.any(), "nothing is written beyond the picture"
        response = result.get_response()
        if library is tritonclient.http:
            assert response["outputs"][0] == {"name": "image", "datatype": "UINT8", "shape": [1, 128, 128, 3]}
        else:
            assert list(response.outputs[0].shape) == [1, 128, 128, 3]
            assert list(response.raw_output_contents) == [b"", b""]


def test_regions_are_listed_and_forgotten(client: Any, library: Any) -> None:
    with region(client, "first", 100) as (_, key), region(client, "second", 200):
        assert names(client.get_system_shared_memory_status()) == {"first", "second"}
        assert names(client.get_system_shared_memory_status("second")) == {"second"}
        assert "is registered already: unregister it first" in refusal(
            lambda: client.register_system_shared_memory("first", key, 100)
        )
        client.unregister_system_shared_memory("first")
        assert names(client.get_system_shared_memory_status()) == {"second"}
        assert "no shared memory region is called 'first'" in refusal(
            lambda: client.get_system_shared_memory_status("first")
        )
        client.unregister_system_shared_memory()
        assert names(client.get_system_shared_memory_status()) == set()


def names(status: Any) -> set[str]:
    return {each["name"] for each in status} if isinstance(status, list) else set(status.regions)


def test_a_region_that_is_too_small_is_found_out_before_the_work(
    client: Any, library: Any, inference_server: Server
) -> None:
    with region(client, "small", 1000):
        image = library.InferRequestedOutput("image")
        image.set_shared_memory("small", 1000)
        steps = inference_server.figure("sdrt_steps_total")
        message = refusal(lambda: client.infer("demo", inputs(library), outputs=[image]))
        assert f"output 'image' takes {PIXELS} bytes and there are 1000 of shared memory" in message
        assert inference_server.figure("sdrt_steps_total") == steps


def test_a_region_that_is_cut_short_meanwhile(client: Any, library: Any, inference_server: Server) -> None:
    """The server goes on: a mapping of it would have ended the process."""
    with region(client, "cut", PIXELS) as (_, key):
        os.truncate(Path("/dev/shm") / key[1:], 100)
        image = library.InferRequestedOutput("image")
        image.set_shared_memory("cut", PIXELS)
        message = refusal(lambda: client.infer("demo", inputs(library), outputs=[image]))
        assert "shared memory region 'cut' was cut short" in message
        prompt, *others = inputs(library)
        prompt.set_shared_memory("cut", 200, offset=50)
        assert "was cut short" in refusal(lambda: client.infer("demo", [prompt, *others]))
    assert client.is_server_live()


def test_a_region_may_be_forgotten_while_it_is_written(
    client: Any, inference_server: Server, pipe: sdrt.Pipeline
) -> None:
    with region(client, "late", PIXELS) as (target, _), ThreadPoolExecutor(1) as threads:
        address = inference_server.url.removeprefix("http://")
        asked = inputs(tritonclient.http, steps=60)
        wanted = tritonclient.http.InferRequestedOutput("image")
        wanted.set_shared_memory("late", PIXELS)

        def ask() -> None:
            with tritonclient.http.InferenceServerClient(address) as opened:
                opened.infer("demo", asked, outputs=[wanted])

        done = threads.submit(ask)
        until("it runs", lambda: inference_server.figure("sdrt_running_images") == 1)
        client.unregister_system_shared_memory("late")
        done.result()
        pixels = shared_memory.get_contents_as_numpy(target, np.uint8, [1, 128, 128, 3])
        np.testing.assert_array_equal(pixels, drawn(pipe, num_inference_steps=60)[None])


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_without_a_gpu_its_memory_is_refused(client: Any) -> None:
    assert names(client.get_cuda_shared_memory_status()) == set()
    for handle, expected in ((bytes(64), "'gpu' cannot be registered: "), (bytes(3), "has 3 bytes: expected 64")):
        encoded = base64.b64encode(handle)
        message = refusal(lambda encoded=encoded: client.register_cuda_shared_memory("gpu", encoded, 0, 100))
        assert expected in message
        assert "\n" not in message
    client.unregister_cuda_shared_memory()


def test_it_is_off_unless_allowed(server: Server) -> None:
    for word in ("system", "cuda"):
        for path in ("status", "region/x/status"):
            status, _, body = curl(server, f"/v2/{word}sharedmemory/{path}")
            assert (status, body) == (
                403,
                {"error": "memory is not shared: start sdrt serve with --allow-shared-memory"},
            )
        for path in ("unregister", "region/x/unregister", "region/x/register"):
            status, _, body = curl(server, f"/v2/{word}sharedmemory/{path}", "-d", "{}")
            assert (status, "--allow-shared-memory" in body["error"]) == (403, True)
    body = '{"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": '
    body += '{"shared_memory_region": "x", "shared_memory_byte_size": 10}}]}'
    status, _, answer = curl(server, "/v2/models/demo/infer", "-d", body)
    assert (status, "--allow-shared-memory" in answer["error"]) == (403, True)
    status, _, answer = curl(server, "/v2")
    assert "system_shared_memory" not in answer["extensions"]
