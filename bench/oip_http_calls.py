"""Requests of the Open Inference Protocol over HTTP, right ones and wrong ones."""

from __future__ import annotations

import base64
import gzip
import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

INFER = "/v2/models/demo/infer"
HEADER_LENGTH = "Inference-Header-Content-Length"
MEMORY_BYTES = 100_000
PROMPT_AT = 2000
"""Where in shared memory there is a prompt."""
TEXT = struct.pack("<I", 6) + b"a star"


@dataclass(frozen=True)
class HttpCall:
    """One request; a body that is no bytes is sent as JSON."""

    name: str
    method: str
    path: str
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


def each_of(*values: Any) -> tuple[Any, ...]:
    """Give values of any types, to go through one after the other."""
    return values


def tensor(name: str, datatype: str, *data: Any, **more: Any) -> dict[str, Any]:
    """Give an input in JSON."""
    return {"name": name, "shape": [len(data)], "datatype": datatype, "data": list(data), **more}


PROMPT = tensor("prompt", "BYTES", "a star")
SMALL = [tensor("width", "INT32", 8), tensor("height", "INT32", 8), tensor("steps", "INT32", 1)]


def asking(*inputs: Any, **more: Any) -> dict[str, Any]:
    """Give a request for a picture of 8x8 pixels, with more inputs and other fields."""
    return {"inputs": [PROMPT, *SMALL, *inputs], **more}


def without(name: str, **instead: Any) -> dict[str, Any]:
    """Give a request whose prompt lacks a field, or has it otherwise."""
    return {"inputs": [{key: value for key, value in PROMPT.items() if key != name} | instead, *SMALL]}


def binary(content: Any, behind: bytes, length: Any = None) -> tuple[bytes, dict[str, str]]:
    """Give a body with binary data behind the JSON, and its header."""
    text = json.dumps(content).encode()
    return text + behind, {HEADER_LENGTH: str(len(text) if length is None else length)}


def _plain_calls() -> Iterator[HttpCall]:
    for path in (
        *("", "/", "/health/live", "/health/ready", "/nothing", "/models/stats", "/models/demo/infer"),
        *(f"/models/demo{what}" for what in ("", "/versions/1", "/versions/2", "/ready", "/versions/3/ready")),
        *(f"/models/demo{what}" for what in ("/config", "/versions/1/config", "/stats", "/versions/1/stats")),
        *(f"/models/nope{what}" for what in ("", "/ready", "/config", "/stats")),
        *("/systemsharedmemory/status", "/systemsharedmemory/region/x/status", "/repository/index"),
        *("/cudasharedmemory/status", "/cudasharedmemory/region/x/status"),
    ):
        yield HttpCall(f"GET {path}", "GET", f"/v2{path}")
    for path in ("", "/health/ready", "/models/demo", "/repository/models/demo/load", "/repository/models/nope/unload"):
        yield HttpCall(f"POST {path}", "POST", f"/v2{path}")
    yield HttpCall("PUT infer", "PUT", INFER)
    yield HttpCall("index", "POST", "/v2/repository/index")
    for content in each_of({"ready": True}, {"ready": 5}, []):
        yield HttpCall(f"index {content}", "POST", "/v2/repository/index", content)


def _infer_calls() -> Iterator[HttpCall]:
    def call(name: str, body: Any, headers: dict[str, str] | None = None, path: str = INFER) -> HttpCall:
        return HttpCall(f"infer: {name}", "POST", path, body, headers or {})

    yield call("plain", asking())
    yield call("with a content type", asking(), {"Content-Type": "text/plain"})
    yield call("of version 1", asking(), path="/v2/models/demo/versions/1/infer")
    yield call("of version 2", asking(), path="/v2/models/demo/versions/2/infer")
    yield call("of no model", asking(), path="/v2/models/nope/infer")
    for given in each_of("abc", "", 5, None):
        yield call(f"id {given!r}", asking(id=given))
    for parameters in each_of(
        {"x": 1, "y": "s", "z": True, "w": 1.5},
        {"priority": 1, "timeout": 1_000_000, "sequence_id": 5, "sequence_start": True, "sequence_end": True},
        {"binary_data_output": True},
        {"binary_data_output": "x"},
        {"x": {}},
        {"triton_x": 1},
        None,
        [],
    ):
        yield call(f"parameters {parameters}", asking(parameters=parameters))
    for outputs in each_of(
        [],
        [{"name": "seed"}],
        [{"name": "seed"}, {"name": "image"}],
        [{"name": "seed"}, {"name": "seed"}],
        [
            {"name": "seed", "parameters": {"binary_data": True}},
            {"name": "image", "parameters": {"binary_data": False}},
        ],
        [{"name": "seed", "parameters": {"binary_data": 5}}],
        [{"name": "image", "parameters": {"classification": 2}}],
        [{"name": "nope"}],
        [{}],
        "x",
    ):
        yield call(f"outputs {outputs}", asking(outputs=outputs))
    for body in each_of(b"", b"{", b"[]", {}, {"inputs": []}, {"inputs": "x"}, {"inputs": [5]}, {"inputs": SMALL}):
        yield call(f"body {body!r}"[:60], body)
    for missing in ("name", "shape", "datatype", "data"):
        yield call(f"without {missing}", without(missing))
    for wrong in each_of(
        *({"datatype": "INT32", "data": [1]}, {"datatype": "STR"}, {"shape": [2]}, {"shape": [1, 1]}),
        *({"shape": [-1]}, {"shape": "1"}, {"shape": [0], "data": []}, {"data": ["x", "y"]}, {"data": [["x"]]}),
        *({"data": [5]}, {"data": "x"}, {"foo": 1}),
    ):
        yield call(f"prompt with {wrong}", without(next(iter(wrong)), **wrong))
    yield call("an unknown field", asking(foo=1))
    yield call("prompt twice", asking(PROMPT))
    yield call("an unknown input", asking(tensor("nope", "INT32", 1)))
    yield call("all inputs", asking(*_other_inputs()))
    for value in each_of(1.5, 2**31, "5", True):
        yield call(f"clip_skip {value!r}", asking(tensor("clip_skip", "INT32", value)))
    yield call("clip_skip of INT64", asking(tensor("clip_skip", "INT64", 0)))
    yield call("clip_skip twice", asking(tensor("clip_skip", "INT32", 0, 0)))
    yield call("guidance_scale 7", asking(tensor("guidance_scale", "FP32", 7)))
    yield call("seed of UINT64", asking(tensor("seed", "UINT64", 2**63)))


def _other_inputs() -> list[dict[str, Any]]:
    return [
        tensor("negative_prompt", "BYTES", "green"),
        tensor("guidance_scale", "FP32", 5.0),
        tensor("seed", "INT64", 42),
        tensor("sampler", "BYTES", "ddim"),
        tensor("eta", "FP32", 0.5),
        tensor("timestep_spacing", "BYTES", "trailing"),
        tensor("clip_skip", "INT32", 0),
        tensor("guidance_interval", "FP32", 0.3, 5.0),
        tensor("cache_interval", "INT32", 1),
    ]


def _binary_calls() -> Iterator[HttpCall]:
    def call(name: str, body: Any, headers: dict[str, str]) -> HttpCall:
        return HttpCall(f"binary: {name}", "POST", INFER, body, headers)

    def prompt(size: Any = None, **more: Any) -> dict[str, Any]:
        parameters = {"binary_data_size": len(TEXT) if size is None else size}
        given = {"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": parameters}
        return {"inputs": [{**given, **more}, *SMALL], "parameters": {"binary_data_output": True}}

    yield call("right", *binary(prompt(), TEXT))
    yield call("cut short", *binary(prompt(), TEXT[:-1]))
    yield call("too long", *binary(prompt(), TEXT + b"x"))
    yield call("no header", json.dumps(prompt()).encode(), {})
    for length in (99_999, 0, -1, "x", 3):
        yield call(f"header length {length}", *binary(prompt(), TEXT, length))
    for size in (0, -1, "10"):
        yield call(f"size {size!r}", *binary(prompt(size), b"" if size == 0 else TEXT))
    for length in (7, 2):
        yield call(f"a string of {length}", *binary(prompt(), struct.pack("<I", length) + b"a star"))
    yield call("and data", *binary(prompt(data=["x"]), TEXT))
    for behind in (struct.pack("<i", 8), struct.pack("<ii", 8, 8)):
        width = {"name": "width", "shape": [1], "datatype": "INT32", "parameters": {"binary_data_size": len(behind)}}
        yield call(f"an integer of {len(behind)} bytes", *binary({"inputs": [PROMPT, width, *SMALL[1:]]}, behind))
    plain = json.dumps(asking()).encode()
    yield call("gzip", gzip.compress(plain), {"Content-Encoding": "gzip"})
    yield call("deflate", zlib.compress(plain), {"Content-Encoding": "deflate"})
    yield call("identity", plain, {"Content-Encoding": "identity"})
    yield call("brotli", plain, {"Content-Encoding": "br"})
    yield call("no gzip", plain, {"Content-Encoding": "gzip"})
    yield call("cut gzip", gzip.compress(plain)[:-9], {"Content-Encoding": "gzip"})
    for accepted in ("gzip", "deflate", "deflate, gzip", "br", "identity"):
        yield call(f"accept {accepted}", plain, {"Accept-Encoding": accepted})
    body, headers = binary(prompt(), TEXT)
    yield call("both ways", gzip.compress(body), {**headers, "Content-Encoding": "gzip", "Accept-Encoding": "gzip"})


def _memory_calls(key: str) -> Iterator[HttpCall]:
    region = "/v2/systemsharedmemory/region"
    whole = {"key": key, "offset": 0, "byte_size": MEMORY_BYTES}

    def register(name: str, body: Any, where: str = "x") -> HttpCall:
        return HttpCall(f"register: {name}", "POST", f"{region}/{where}/register", body)

    yield register("no such object", {**whole, "key": "/sdrt-nothing"})
    yield register("no size", {"key": key})
    yield register("a number as key", {**whole, "key": 5})
    yield register("no body", b"")
    yield register("too large", {**whole, "byte_size": 1 << 40})
    yield register("a negative offset", {**whole, "offset": -1})
    yield register("no name", whole, "")
    yield register("right", whole)
    yield register("again", whole)
    yield HttpCall("regions", "GET", "/v2/systemsharedmemory/status")
    yield HttpCall("region x", "GET", f"{region}/x/status")
    yield HttpCall("region x as CUDA's", "GET", "/v2/cudasharedmemory/region/x/status")
    handle = {"b64": base64.b64encode(b"x" * 64).decode()}
    cuda = {"raw_handle": handle, "device_id": 0, "byte_size": 10}
    for name, wrong in each_of(
        ("a handle of nothing", {}),
        ("a short handle", {"raw_handle": {"b64": "AAAA"}}),
        ("no object as handle", {"raw_handle": "x"}),
    ):
        yield HttpCall(f"register CUDA: {name}", "POST", "/v2/cudasharedmemory/region/z/register", {**cuda, **wrong})
    image = {"shared_memory_region": "x", "shared_memory_byte_size": 1000}
    for wrong in each_of(
        *({}, {"shared_memory_offset": 64}, {"binary_data": True}, {"shared_memory_byte_size": 10}),
        *({"shared_memory_byte_size": 1 << 30}, {"shared_memory_byte_size": "x"}, {"shared_memory_offset": -1}),
        *({"shared_memory_region": 5}, {"shared_memory_region": "nope"}),
    ):
        outputs = [{"name": "image", "parameters": {**image, **wrong}}, {"name": "seed"}]
        yield HttpCall(f"to shared memory {wrong}", "POST", INFER, asking(outputs=outputs))
    for size in (len(TEXT), len(TEXT) + 2, None):
        parameters: Any = {
            "shared_memory_region": "x",
            "shared_memory_byte_size": size,
            "shared_memory_offset": PROMPT_AT,
        }
        given: Any = {"name": "prompt", "shape": [1], "datatype": "BYTES"}
        given["parameters"] = {name: value for name, value in parameters.items() if value is not None}
        yield HttpCall(f"from shared memory, {size} bytes", "POST", INFER, {"inputs": [given, *SMALL]})
    yield HttpCall("unregister x", "POST", f"{region}/x/unregister")
    yield HttpCall("unregister x again", "POST", f"{region}/x/unregister")
    yield HttpCall("unregister all", "POST", "/v2/systemsharedmemory/unregister")
    yield HttpCall("unregister all of CUDA's", "POST", "/v2/cudasharedmemory/unregister")


def http_calls(key: str) -> list[HttpCall]:
    """Give all requests, in their order; `key` is that of shared memory with a prompt in it."""
    return [*_plain_calls(), *_infer_calls(), *_binary_calls(), *_memory_calls(key)]
