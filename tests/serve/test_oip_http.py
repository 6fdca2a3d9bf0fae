"""tritonclient over HTTP against the server: pictures as `sdrt run` makes them, in tensors, and refusals."""

from __future__ import annotations

import asyncio
import http.client
import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

from sdrt.cli import main

from .server import until
from .test_http import curl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    import sdrt

    from .server import Server

PROMPT = "a large red star on a blue background"
DATATYPES = {"steps": "INT32", "guidance_scale": "FP32", "seed": "INT64", "eta": "FP32", "clip_skip": "INT32"}
DATATYPES |= {"width": "INT32", "height": "INT32", "guidance_interval": "FP32", "cache_interval": "INT32"}
DATATYPES |= {"encoder_interval": "INT32"}
NUMPY = {"INT32": np.int32, "INT64": np.int64, "UINT64": np.uint64, "FP32": np.float32}
INFER = "/v2/models/demo/infer"


def arrays(**given: Any) -> dict[str, tuple[str, NDArray[Any]]]:
    """Give inputs by name: datatype and elements; the prompt unless given, four steps and the seed 42."""
    found: dict[str, tuple[str, NDArray[Any]]] = {}
    for name, value in {"prompt": PROMPT, "steps": 4, "seed": 42, **given}.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], str):
            found[name] = "BYTES", np.array([each.encode() for each in values], np.object_)
        else:
            found[name] = DATATYPES[name], np.array(values, NUMPY[DATATYPES[name]])
    return found


def inputs(library: Any, **given: Any) -> list[Any]:
    """Make the inputs of tritonclient's HTTP or gRPC library."""
    made = []
    for name, (datatype, array) in arrays(**given).items():
        tensor = library.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def drawn(pipe: sdrt.Pipeline, prompt: str = PROMPT, **arguments: Any) -> NDArray[np.uint8]:
    """The pixels of the picture that the pipeline makes in this process."""
    (image,) = pipe(prompt, **{"num_inference_steps": 4, "seed": 42, **arguments})
    return np.asarray(image)


@pytest.fixture
def client(inference_server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(inference_server.url.removeprefix("http://"), network_timeout=120) as opened:
        yield opened


def test_the_pixels_are_those_of_sdrt_run(
    client: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scale that FP32 has not exactly: the shortest decimal number that rounds to it is meant."""
    monkeypatch.setenv("SDRT_HOME", str(home))
    path = tmp_path / "star.png"
    options = [
        "-n",
        "green",
        "--steps",
        "4",
        "--seed",
        "42",
        "--cfg-scale",
        "7.1",
        "--sampler",
        "euler",
        "-o",
        str(path),
    ]
    assert main(["run", PROMPT, "--bundle", "demo", *options]) == 0
    asked = inputs(triton, negative_prompt="green", guidance_scale=7.1, sampler="Euler")
    result = client.infer("demo", asked, request_id="first")
    image = result.as_numpy("image")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.asarray(Image.open(path))[None])
    assert result.as_numpy("seed").tolist() == [42]
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("first", "demo", "1")


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("in_binary", [True, False], ids=["binary", "json"])
def test_every_form_says_the_same(client: Any, pipe: sdrt.Pipeline, in_binary: bool, compression: str | None) -> None:
    asked = []
    for name, (datatype, array) in arrays().items():
        tensor = triton.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array, binary_data=in_binary)
        asked.append(tensor)
    wanted = [triton.InferRequestedOutput("image", binary_data=in_binary)]
    more = {"request_compression_algorithm": compression, "response_compression_algorithm": compression}
    result = client.infer("demo", asked, outputs=wanted, model_version="1", **more)
    np.testing.assert_array_equal(result.as_numpy("image"), drawn(pipe)[None])
    assert result.as_numpy("seed") is None, "it was not asked for"


def test_pictures_are_the_same_alone_and_with_others(inference_server: Server, pipe: sdrt.Pipeline) -> None:
    orders: list[dict[str, Any]] = [
        {"prompt": f"a {colour} ring", "seed": seed, "guidance_scale": 3.0 + seed, "steps": 8}
        for seed, colour in enumerate(["red", "green", "blue"])
    ]
    orders += [
        {"sampler": "euler_a", "width": 64, "height": 136},
        {"guidance_interval": [0.3, 5.0], "steps": 8},
        {"encoder_interval": 2, "steps": 8},
        {"sampler": "ddim", "eta": 1.0, "timestep_spacing": "trailing", "clip_skip": 1},
    ]
    shared, calls = (inference_server.figure(f"sdrt_batch_images_{what}") for what in ("sum", "count"))

    async def ask() -> list[Any]:
        address = inference_server.url.removeprefix("http://")
        async with aio.InferenceServerClient(address) as opened:
            return await asyncio.gather(*(opened.infer("demo", inputs(triton, **order)) for order in orders))

    for order, result in zip(orders, asyncio.run(ask()), strict=True):
        arguments = dict(order)
        if "steps" in arguments:
            arguments["num_inference_steps"] = arguments.pop("steps")
        np.testing.assert_array_equal(result.as_numpy("image"), drawn(pipe, **arguments)[None])
    shared = inference_server.figure("sdrt_batch_images_sum") - shared
    calls = inference_server.figure("sdrt_batch_images_count") - calls
    assert shared > calls, "none of the pictures shared a call"


def test_several_prompts(client: Any, pipe: sdrt.Pipeline) -> None:
    """One seed counts on from picture to picture; several are one for each, as are negative prompts."""
    prompts = ["a red star", "a green ring"]
    result = client.infer("demo", inputs(triton, prompt=prompts, seed=7))
    assert result.as_numpy("seed").tolist() == [7, 8]
    np.testing.assert_array_equal(
        result.as_numpy("image"), [drawn(pipe, each, seed=7 + n) for n, each in enumerate(prompts)]
    )
    result = client.infer("demo", inputs(triton, prompt=prompts, seed=[9, -3], negative_prompt=["blue", "white"]))
    assert result.as_numpy("seed").tolist() == [9, -3]
    expected = [
        drawn(pipe, "a red star", seed=9, negative_prompt="blue"),
        drawn(pipe, "a green ring", seed=-3, negative_prompt="white"),
    ]
    np.testing.assert_array_equal(result.as_numpy("image"), expected)


def test_seeds_beyond_int64(client: Any, pipe: sdrt.Pipeline) -> None:
    asked = [tensor for tensor in inputs(triton) if tensor.name() != "seed"]
    seed = triton.InferInput("seed", [1], "UINT64")
    seed.set_data_from_numpy(np.array([2**64 - 1], np.uint64))
    result = client.infer("demo", [*asked, seed])
    np.testing.assert_array_equal(result.as_numpy("image"), drawn(pipe, seed=2**64 - 1)[None])
    assert result.as_numpy("seed").view(np.uint64).tolist() == [2**64 - 1]
    first, second = (client.infer("demo", asked) for _ in range(2))
    assert first.as_numpy("seed") != second.as_numpy("seed"), "drawn where none is given"


def test_server_and_model_describe_themselves(client: Any, inference_server: Server) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("demo")
    assert client.is_model_ready("demo", "1")
    assert not client.is_model_ready("demo", "2")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "sdrt"
    assert "system_shared_memory" in client.get_server_metadata()["extensions"]
    described = client.get_model_metadata("demo")
    assert (described["versions"], described["platform"]) == (["1"], "sdrt")
    assert {"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]} in described["outputs"]
    configuration = client.get_model_config("demo")
    assert [each["name"] for each in configuration["input"]] == [each["name"] for each in described["inputs"]]
    assert configuration["parameters"]["steps"]["string_value"] == "Steps of the sampler, 50 by default."
    assert client.get_model_repository_index() == [{"name": "demo", "version": "1", "state": "READY"}]
    before = client.get_inference_statistics("demo")["model_stats"][0]
    client.infer("demo", inputs(triton))
    after = client.get_inference_statistics()["model_stats"][0]
    assert after["inference_count"] == before["inference_count"] + 1
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    for phase in ("queue", "compute_input", "compute_infer", "compute_output", "success"):
        assert after["inference_stats"][phase]["ns"] > before["inference_stats"][phase]["ns"]


def test_models_are_fixed(client: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"\[400\] models are neither loaded nor unloaded"):
        client.load_model("demo")
    with pytest.raises(InferenceServerException, match=r"\[404\] there is no model 'other': expected one of demo"):
        client.get_model_metadata("other")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": ["x"] * 11}, "there are 11 prompts: expected 1 to 10"),
        ({"prompt": "x" * 32_001}, "expected a string of at most 32000 characters"),
        ({"prompt": "a\0b"}, "a prompt has a NUL character at position 1"),
        ({"steps": 0}, "steps is 0: expected a whole number from 1 to 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale is NaN: expected a number from 0 to 1000"),
        ({"guidance_interval": [5.0, 1.0]}, "expected two noise levels"),
        ({"sampler": "dpm++"}, "sampler is 'dpm++': expected one of ddpm"),
        ({"timestep_spacing": "even"}, 'expected "leading" or "trailing" or "linspace"'),
        ({"width": 100}, "width is 100: expected a multiple of 8"),
        ({"width": 264, "height": 256}, "size is 264x256: expected at most 256x256, or the same area"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "'seed' has 3 elements and there are 2 prompts: expected 1 or 2"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(client: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("demo", inputs(triton, **given))
    assert caught.value.status() == "400"
    assert message in caught.value.message()
    assert "\n" not in caught.value.message()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "the body is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["\\ud800"]}]}', "surrogate"),
        (
            b'{"inputs": [{"name": "\\ud800", "shape": [1], "datatype": "BYTES", "data": []}]}',
            "unknown input '\\ud800'",
        ),
        (b'{"inputs": [{"name": "prompt", "shape": [9e99], "datatype": "BYTES", "data": []}]}', "inputs[0].shape"),
        (b'{"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [[[]]]}]}', "has 0 elements"),
        (
            b'{"inputs": [], "outputs": [{"name": "image", "parameters": 5}]}',
            "outputs[0].parameters is of a wrong type",
        ),
    ],
)
def test_bodies_that_are_none(inference_server: Server, content: bytes, message: str) -> None:
    status, _, body = curl(inference_server, INFER, "-X", "POST", "--data-binary", "@-", stdin=content)
    assert status == 400
    assert message in body["error"]


def test_a_body_that_swells(inference_server: Server) -> None:
    """A megabyte at most, also when inflated: this one would take 256 of them."""
    deflate = zlib.compressobj(9, wbits=31)
    bomb = b"".join(deflate.compress(bytes(1 << 20)) for _ in range(256)) + deflate.flush()
    assert len(bomb) < 1 << 20
    options = ("-X", "POST", "-H", "Content-Encoding: gzip", "-H", "Expect:", "--data-binary", "@-")
    before = inference_server.figure("process_resident_memory_bytes")
    status, _, body = curl(inference_server, INFER, *options, stdin=bomb)
    assert status == 413
    assert "expected at most 1048576 bytes" in body["error"]
    assert inference_server.figure("process_resident_memory_bytes") - before < 100e6


def test_pages_from_elsewhere_are_not_answered(inference_server: Server) -> None:
    """A browser would send such a request, and the Host header says nothing against it."""
    body = json.dumps({"inputs": []})
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example:80"):
        status, _, answer = curl(inference_server, INFER, "-H", f"Origin: {origin}", "-d", body)
        assert status == 403
        assert "a page from elsewhere asks" in answer["error"]
    assert curl(inference_server, INFER, "-H", f"Origin: {inference_server.url}", "-d", body)[0] == 400


def test_a_client_that_leaves_stops_its_work(inference_server: Server) -> None:
    endless = {
        name: {"name": name, "shape": [1], "datatype": kind, "data": [value]}
        for name, kind, value in (("prompt", "BYTES", PROMPT), ("steps", "INT32", 1000), ("sampler", "BYTES", "ddpm"))
    }
    connection = http.client.HTTPConnection(inference_server.url.removeprefix("http://"))
    connection.request("POST", INFER, json.dumps({"inputs": list(endless.values())}))
    until("it runs", lambda: inference_server.figure("sdrt_running_images") == 1)
    connection.close()
    until("it has stopped", lambda: inference_server.figure("sdrt_running_images") == 0, within_s=10)
