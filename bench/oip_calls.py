"""Calls of the Open Inference Protocol, right ones and wrong ones, and what the answers look like.

`bench.triton` makes them to a Triton Inference Server and keeps what it says; the tests make them to sdrt and compare.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import secrets
import struct
import time
import zlib
from dataclasses import dataclass, field
from multiprocessing import shared_memory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

INFER = "/v2/models/demo/infer"
HEADER_LENGTH = "Inference-Header-Content-Length"
MEMORY_BYTES = 100_000
_TEXT = struct.pack("<I", 6) + b"a star"
_KEPT = {"name", "datatype", "shape", "model_name", "model_version", "id", "state", "byte_size", "offset", "dims"}
"""Fields whose values are compared, and not their types alone."""


@dataclass(frozen=True)
class HttpCall:
    """One request; a body that is no bytes is sent as JSON."""

    name: str
    method: str
    path: str
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GrpcCall:
    """One call; the request's fields, or those of several for a stream, are in protocol buffers' JSON."""

    name: str
    method: str
    request: Any = field(default_factory=dict)


def _all(*values: Any) -> tuple[Any, ...]:
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
    for content in _all({"ready": True}, {"ready": 5}, []):
        yield HttpCall(f"index {content}", "POST", "/v2/repository/index", content)


def _infer_calls() -> Iterator[HttpCall]:
    def call(name: str, body: Any, headers: dict[str, str] | None = None, path: str = INFER) -> HttpCall:
        return HttpCall(f"infer: {name}", "POST", path, body, headers or {})

    yield call("plain", asking())
    yield call("with a content type", asking(), {"Content-Type": "text/plain"})
    yield call("of version 1", asking(), path="/v2/models/demo/versions/1/infer")
    yield call("of version 2", asking(), path="/v2/models/demo/versions/2/infer")
    yield call("of no model", asking(), path="/v2/models/nope/infer")
    for given in _all("abc", "", 5, None):
        yield call(f"id {given!r}", asking(id=given))
    for parameters in _all(
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
    for outputs in _all(
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
    for body in _all(b"", b"{", b"[]", {}, {"inputs": []}, {"inputs": "x"}, {"inputs": [5]}, {"inputs": SMALL}):
        yield call(f"body {body!r}"[:60], body)
    for missing in ("name", "shape", "datatype", "data"):
        yield call(f"without {missing}", without(missing))
    for wrong in _all(
        *({"datatype": "INT32", "data": [1]}, {"datatype": "STR"}, {"shape": [2]}, {"shape": [1, 1]}),
        *({"shape": [-1]}, {"shape": "1"}, {"shape": [0], "data": []}, {"data": ["x", "y"]}, {"data": [["x"]]}),
        *({"data": [5]}, {"data": "x"}, {"foo": 1}),
    ):
        yield call(f"prompt with {wrong}", without(next(iter(wrong)), **wrong))
    yield call("an unknown field", asking(foo=1))
    yield call("prompt twice", asking(PROMPT))
    yield call("an unknown input", asking(tensor("nope", "INT32", 1)))
    yield call("all inputs", asking(*_other_inputs()))
    for value in _all(1.5, 2**31, "5", True):
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
        parameters = {"binary_data_size": len(_TEXT) if size is None else size}
        given = {"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": parameters}
        return {"inputs": [{**given, **more}, *SMALL], "parameters": {"binary_data_output": True}}

    yield call("right", *binary(prompt(), _TEXT))
    yield call("cut short", *binary(prompt(), _TEXT[:-1]))
    yield call("too long", *binary(prompt(), _TEXT + b"x"))
    yield call("no header", json.dumps(prompt()).encode(), {})
    for length in (99_999, 0, -1, "x", 3):
        yield call(f"header length {length}", *binary(prompt(), _TEXT, length))
    for size in (0, -1, "10"):
        yield call(f"size {size!r}", *binary(prompt(size), b"" if size == 0 else _TEXT))
    for length in (7, 2):
        yield call(f"a string of {length}", *binary(prompt(), struct.pack("<I", length) + b"a star"))
    yield call("and data", *binary(prompt(data=["x"]), _TEXT))
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
    body, headers = binary(prompt(), _TEXT)
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
    for name, wrong in _all(
        ("a handle of nothing", {}),
        ("a short handle", {"raw_handle": {"b64": "AAAA"}}),
        ("no object as handle", {"raw_handle": "x"}),
    ):
        yield HttpCall(f"register CUDA: {name}", "POST", "/v2/cudasharedmemory/region/z/register", {**cuda, **wrong})
    image = {"shared_memory_region": "x", "shared_memory_byte_size": 1000}
    for wrong in _all(
        *({}, {"shared_memory_offset": 64}, {"binary_data": True}, {"shared_memory_byte_size": 10}),
        *({"shared_memory_byte_size": 1 << 30}, {"shared_memory_byte_size": "x"}, {"shared_memory_offset": -1}),
        *({"shared_memory_region": 5}, {"shared_memory_region": "nope"}),
    ):
        outputs = [{"name": "image", "parameters": {**image, **wrong}}, {"name": "seed"}]
        yield HttpCall(f"to shared memory {wrong}", "POST", INFER, asking(outputs=outputs))
    for size in (len(_TEXT), len(_TEXT) + 2, None):
        parameters: Any = {"shared_memory_region": "x", "shared_memory_byte_size": size, "shared_memory_offset": 2000}
        given: Any = {"name": "prompt", "shape": [1], "datatype": "BYTES"}
        given["parameters"] = {name: value for name, value in parameters.items() if value is not None}
        yield HttpCall(f"from shared memory, {size} bytes", "POST", INFER, {"inputs": [given, *SMALL]})
    yield HttpCall("unregister x", "POST", f"{region}/x/unregister")
    yield HttpCall("unregister x again", "POST", f"{region}/x/unregister")
    yield HttpCall("unregister all", "POST", "/v2/systemsharedmemory/unregister")
    yield HttpCall("unregister all of CUDA's", "POST", "/v2/cudasharedmemory/unregister")


def _message(text: bytes) -> str:
    return base64.b64encode(text).decode()


def _grpc_calls(key: str) -> Iterator[GrpcCall]:
    yield GrpcCall("live", "ServerLive")
    yield GrpcCall("ready", "ServerReady")
    yield GrpcCall("server", "ServerMetadata")
    for method in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"):
        for request in _all(
            {"name": "demo"},
            {"name": "demo", "version": "1"},
            {"name": "demo", "version": "2"},
            {"name": "nope"},
            {},
        ):
            yield GrpcCall(f"{method} {request}", method, request)
    for request in _all({}, {"ready": True}, {"repository_name": "x"}):
        yield GrpcCall(f"index {request}", "RepositoryIndex", request)
    yield GrpcCall("load", "RepositoryModelLoad", {"model_name": "demo"})
    yield GrpcCall("unload", "RepositoryModelUnload", {"model_name": "demo"})
    yield from _grpc_infer_calls()
    yield from _grpc_memory_calls(key)


def _in_contents(name: str, datatype: str, contents: str, *values: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [len(values)], "contents": {contents: list(values)}, **more}


_GRPC_PROMPT = _in_contents("prompt", "BYTES", "bytes_contents", _message(b"a star"))
_GRPC_SMALL = [_in_contents(each["name"], "INT32", "int_contents", *each["data"]) for each in SMALL]


def _grpc_asking(*inputs: Any, **more: Any) -> dict[str, Any]:
    return {"model_name": "demo", "inputs": [_GRPC_PROMPT, *_GRPC_SMALL, *inputs], **more}


def _grpc_infer_calls() -> Iterator[GrpcCall]:
    def call(name: str, request: Any) -> GrpcCall:
        return GrpcCall(f"infer: {name}", "ModelInfer", request)

    yield call("plain", _grpc_asking())
    yield call("with an id", _grpc_asking(id="abc", parameters={"x": {"int64_param": 1}}))
    yield call("a reserved parameter", _grpc_asking(parameters={"triton_x": {"int64_param": 1}}))
    yield call("an empty parameter", _grpc_asking(parameters={"x": {}}))
    for wrong in _all({"model_version": "1"}, {"model_version": "2"}, {"model_name": "nope"}, {"model_name": ""}):
        yield call(f"{wrong}", _grpc_asking(**wrong))
    yield call("no inputs", {"model_name": "demo"})
    for outputs in _all(["seed"], ["seed", "image"], ["seed", "seed"], ["nope"], [""]):
        yield call(f"outputs {outputs}", _grpc_asking(outputs=[{"name": name} for name in outputs]))
    yield call("an unknown input", _grpc_asking(_in_contents("nope", "INT32", "int_contents", 1)))
    yield call("prompt twice", _grpc_asking(_GRPC_PROMPT))
    skip = _in_contents("clip_skip", "INT32", "int_contents", 0)
    for name, wrong in _all(
        ("right", {}),
        ("of INT64", {"datatype": "INT64", "contents": {"int64_contents": [0]}}),
        ("of INT32 with others", {"contents": {"int64_contents": [0]}}),
        ("two for one", {"contents": {"int_contents": [0, 0]}}),
        ("no contents", {"contents": {}}),
        ("of two", {"shape": [2], "contents": {"int_contents": [0, 0]}}),
        ("of less than none", {"shape": [-1]}),
        ("of no dimensions", {"shape": []}),
        ("of no datatype", {"datatype": "x"}),
    ):
        yield call(f"clip_skip {name}", _grpc_asking({**skip, **wrong}))
    raw_prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1]}
    raw_small = [{"name": each["name"], "datatype": "INT32", "shape": [1]} for each in SMALL]
    texts = [_TEXT, *(struct.pack("<i", each["data"][0]) for each in SMALL)]
    for name, inputs, raw in _all(
        ("right", raw_small, texts),
        ("one too few", raw_small, texts[:-1]),
        ("contents as well", _GRPC_SMALL, texts),
        ("a prompt cut short", raw_small, [_TEXT[:-1], *texts[1:]]),
        ("a prompt too long", raw_small, [_TEXT + b"x", *texts[1:]]),
        ("two prompts for one", raw_small, [_TEXT + _TEXT, *texts[1:]]),
        ("an integer of three bytes", raw_small, [_TEXT, b"abc", *texts[2:]]),
    ):
        contents = [_message(part) for part in raw]
        yield call(
            f"raw {name}", {"model_name": "demo", "inputs": [raw_prompt, *inputs], "raw_input_contents": contents}
        )
    yield GrpcCall("stream: two", "ModelStreamInfer", [_grpc_asking(id="1"), _grpc_asking(id="2")])
    requests = [
        _grpc_asking(id="1", model_name="nope"),
        _grpc_asking(id="2", outputs=[{"name": "x"}]),
        _grpc_asking(id="3"),
    ]
    yield GrpcCall("stream: two wrong ones and a right one", "ModelStreamInfer", requests)
    final = {"triton_enable_empty_final_response": {"bool_param": True}}
    yield GrpcCall("stream: a final one", "ModelStreamInfer", [_grpc_asking(parameters=final)])
    yield GrpcCall("stream: nothing", "ModelStreamInfer", [])


def _grpc_memory_calls(key: str) -> Iterator[GrpcCall]:
    whole = {"name": "x", "key": key, "byte_size": MEMORY_BYTES}
    yield GrpcCall("no regions", "SystemSharedMemoryStatus")
    yield GrpcCall("no region x", "SystemSharedMemoryStatus", {"name": "x"})
    for name, wrong in _all(
        ("no such object", {"key": "/sdrt-nothing"}),
        ("no key", {"key": ""}),
        ("too large", {"byte_size": 1 << 40}),
        ("right", {}),
        ("again", {}),
    ):
        yield GrpcCall(f"register: {name}", "SystemSharedMemoryRegister", {**whole, **wrong})
    yield GrpcCall("regions", "SystemSharedMemoryStatus")
    yield GrpcCall("region x as CUDA's", "CudaSharedMemoryStatus", {"name": "x"})
    for name, handle in (("a handle of nothing", b"x" * 64), ("a short handle", b"x")):
        request = {"name": "z", "raw_handle": _message(handle), "byte_size": 10}
        yield GrpcCall(f"register CUDA: {name}", "CudaSharedMemoryRegister", request)
    parameters: Any = {"shared_memory_region": {"string_param": "x"}, "shared_memory_byte_size": {"int64_param": 1000}}
    for wrong in _all(
        *({}, {"shared_memory_offset": {"int64_param": 64}}, {"shared_memory_offset": {"int64_param": -1}}),
        *({"shared_memory_byte_size": {"int64_param": size}} for size in (10, 1 << 30)),
        *({"shared_memory_byte_size": {"string_param": "x"}}, {"shared_memory_region": {"int64_param": 1}}),
        {"shared_memory_region": {"string_param": "nope"}},
    ):
        outputs = [{"name": "image", "parameters": {**parameters, **wrong}}]
        yield GrpcCall(f"to shared memory {wrong}", "ModelInfer", _grpc_asking(outputs=outputs))
    parameters |= {"shared_memory_offset": {"int64_param": 2000}}
    for size in (len(_TEXT), len(_TEXT) + 2):
        parameters["shared_memory_byte_size"] = {"int64_param": size}
        prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1], "parameters": dict(parameters)}
        request = {"model_name": "demo", "inputs": [prompt, *_GRPC_SMALL]}
        yield GrpcCall(f"from shared memory, {size} bytes", "ModelInfer", request)
    yield GrpcCall("unregister x", "SystemSharedMemoryUnregister", {"name": "x"})
    yield GrpcCall("unregister all", "SystemSharedMemoryUnregister")


def answers(http_address: str, grpc_address: str) -> dict[str, Any]:
    """Make all calls to a server of a model called demo, and describe its answers.

    Parameters
    ----------
    http_address, grpc_address
        Such as ``127.0.0.1:8000``; the server runs on this machine and shares memory.

    """
    with _memory() as key:
        calls = [*_plain_calls(), *_infer_calls(), *_binary_calls(), *_memory_calls(key)]
        found = {f"http {call.name}": _over_http(http_address, call) for call in calls}
        found |= _over_grpc(grpc_address, list(_grpc_calls(key)))
    return found


@contextlib.contextmanager
def _memory() -> Iterator[str]:
    """Make shared memory with a prompt in it, and give its key."""
    memory = shared_memory.SharedMemory(f"sdrt-{secrets.token_hex(8)}", create=True, size=MEMORY_BYTES)
    assert memory.buf is not None
    memory.buf[2000 : 2000 + len(_TEXT)] = _TEXT
    try:
        yield f"/{memory.name}"
    finally:
        memory.close()
        memory.unlink()


def _over_http(address: str, call: HttpCall) -> dict[str, Any]:
    body = call.body if isinstance(call.body, bytes) else json.dumps(call.body).encode()
    for _ in range(5):
        connection = http.client.HTTPConnection(address, timeout=60)
        try:
            connection.request(call.method, call.path, body, call.headers)
            response = connection.getresponse()
            content = response.read()
            break
        except http.client.RemoteDisconnected:  # Triton does so now and then after an error
            time.sleep(0.1)
        finally:
            connection.close()
    else:
        return {"status": "gone"}
    described: dict[str, Any] = {"status": response.status}
    if encoding := response.getheader("Content-Encoding"):
        described["encoding"] = encoding
        content = gzip.decompress(content) if encoding == "gzip" else zlib.decompress(content)
    length = response.getheader(HEADER_LENGTH)
    if response.status == 200 and content:
        described["type"] = response.getheader("Content-Type")
    if length is not None:
        described["binary"] = len(content) - int(length)
        content = content[: int(length)]
    described["body"] = shape_of(json.loads(content)) if content else None
    return described


def _over_grpc(address: str, calls: list[GrpcCall]) -> dict[str, Any]:
    import grpc  # noqa: PLC0415 - where the calls are made there is a client
    from google.protobuf.json_format import MessageToDict, ParseDict  # noqa: PLC0415
    from tritonclient.grpc import service_pb2, service_pb2_grpc  # noqa: PLC0415

    def described(message: Any) -> Any:
        content = MessageToDict(message, preserving_proto_field_name=True)
        answer = content.get("infer_response", content)
        if raw := answer.pop("raw_output_contents", None):
            answer["raw_output_bytes"] = [len(base64.b64decode(part)) for part in raw]
        return shape_of(content)

    found: dict[str, Any] = {}
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for call in calls:
            try:
                if isinstance(call.request, list):
                    requests = [ParseDict(each, service_pb2.ModelInferRequest()) for each in call.request]
                    messages = [described(each) for each in stub.ModelStreamInfer(iter(requests), timeout=60)]
                    answer = {"code": "OK", "messages": messages}
                else:
                    request = ParseDict(
                        call.request, getattr(service_pb2, f"{call.method}Request", service_pb2.ModelInferRequest)()
                    )
                    answer = {"code": "OK", "message": described(getattr(stub, call.method)(request, timeout=60))}
            except grpc.RpcError as error:
                answer = {"code": error.code().name}
            found[f"grpc {call.name}"] = answer
    return found


def shape_of(content: Any, name: str = "") -> Any:
    """Describe JSON: its fields and the types of their values, and the values themselves where they must agree.

    A list of things of one shape is described by the first of them; numbers in it are counted.
    """
    if isinstance(content, dict):
        return {key: shape_of(value, key) for key, value in sorted(content.items())}
    if name in _KEPT or name == "raw_output_bytes":
        return content
    if isinstance(content, list):
        shapes = [shape_of(value, name) for value in content]
        if len(shapes) > 1 and all(shape == shapes[0] for shape in shapes) and not isinstance(shapes[0], dict):
            return [shapes[0], len(shapes)]
        return shapes
    return type(content).__name__
