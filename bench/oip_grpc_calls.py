"""Calls of the Open Inference Protocol over gRPC, right ones and wrong ones."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .oip_http_calls import MEMORY_BYTES, PROMPT_AT, SMALL, TEXT, each_of

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class GrpcCall:
    """One call; the request's fields, or those of several for a stream, are in protocol buffers' JSON."""

    name: str
    method: str
    request: Any = field(default_factory=dict)


def _message(text: bytes) -> str:
    return base64.b64encode(text).decode()


def grpc_calls(key: str) -> Iterator[GrpcCall]:
    """Give all calls, in their order; `key` is that of shared memory with a prompt in it."""
    yield GrpcCall("live", "ServerLive")
    yield GrpcCall("ready", "ServerReady")
    yield GrpcCall("server", "ServerMetadata")
    for method in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"):
        for request in each_of(
            {"name": "demo"},
            {"name": "demo", "version": "1"},
            {"name": "demo", "version": "2"},
            {"name": "nope"},
            {},
        ):
            yield GrpcCall(f"{method} {request}", method, request)
    for request in each_of({}, {"ready": True}, {"repository_name": "x"}):
        yield GrpcCall(f"index {request}", "RepositoryIndex", request)
    yield GrpcCall("load", "RepositoryModelLoad", {"model_name": "demo"})
    yield GrpcCall("unload", "RepositoryModelUnload", {"model_name": "demo"})
    yield from _infer_calls()
    yield from _memory_calls(key)


def _in_contents(name: str, datatype: str, contents: str, *values: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [len(values)], "contents": {contents: list(values)}, **more}


_PROMPT = _in_contents("prompt", "BYTES", "bytes_contents", _message(b"a star"))
_SMALL = [_in_contents(each["name"], "INT32", "int_contents", *each["data"]) for each in SMALL]


def _asking(*inputs: Any, **more: Any) -> dict[str, Any]:
    return {"model_name": "demo", "inputs": [_PROMPT, *_SMALL, *inputs], **more}


def _infer_calls() -> Iterator[GrpcCall]:
    def call(name: str, request: Any) -> GrpcCall:
        return GrpcCall(f"infer: {name}", "ModelInfer", request)

    yield call("plain", _asking())
    yield call("with an id", _asking(id="abc", parameters={"x": {"int64_param": 1}}))
    yield call("a reserved parameter", _asking(parameters={"triton_x": {"int64_param": 1}}))
    yield call("an empty parameter", _asking(parameters={"x": {}}))
    for wrong in each_of({"model_version": "1"}, {"model_version": "2"}, {"model_name": "nope"}, {"model_name": ""}):
        yield call(f"{wrong}", _asking(**wrong))
    yield call("no inputs", {"model_name": "demo"})
    for outputs in each_of(["seed"], ["seed", "image"], ["seed", "seed"], ["nope"], [""]):
        yield call(f"outputs {outputs}", _asking(outputs=[{"name": name} for name in outputs]))
    yield call("an unknown input", _asking(_in_contents("nope", "INT32", "int_contents", 1)))
    yield call("prompt twice", _asking(_PROMPT))
    skip = _in_contents("clip_skip", "INT32", "int_contents", 0)
    for name, wrong in each_of(
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
        yield call(f"clip_skip {name}", _asking({**skip, **wrong}))
    raw_prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1]}
    raw_small = [{"name": each["name"], "datatype": "INT32", "shape": [1]} for each in SMALL]
    texts = [TEXT, *(struct.pack("<i", each["data"][0]) for each in SMALL)]
    for name, inputs, raw in each_of(
        ("right", raw_small, texts),
        ("one too few", raw_small, texts[:-1]),
        ("contents as well", _SMALL, texts),
        ("a prompt cut short", raw_small, [TEXT[:-1], *texts[1:]]),
        ("a prompt too long", raw_small, [TEXT + b"x", *texts[1:]]),
        ("two prompts for one", raw_small, [TEXT + TEXT, *texts[1:]]),
        ("an integer of three bytes", raw_small, [TEXT, b"abc", *texts[2:]]),
    ):
        contents = [_message(part) for part in raw]
        yield call(
            f"raw {name}", {"model_name": "demo", "inputs": [raw_prompt, *inputs], "raw_input_contents": contents}
        )
    yield GrpcCall("stream: two", "ModelStreamInfer", [_asking(id="1"), _asking(id="2")])
    requests = [
        _asking(id="1", model_name="nope"),
        _asking(id="2", outputs=[{"name": "x"}]),
        _asking(id="3"),
    ]
    yield GrpcCall("stream: two wrong ones and a right one", "ModelStreamInfer", requests)
    final = {"triton_enable_empty_final_response": {"bool_param": True}}
    yield GrpcCall("stream: a final one", "ModelStreamInfer", [_asking(parameters=final)])
    yield GrpcCall("stream: nothing", "ModelStreamInfer", [])


def _memory_calls(key: str) -> Iterator[GrpcCall]:
    whole = {"name": "x", "key": key, "byte_size": MEMORY_BYTES}
    yield GrpcCall("no regions", "SystemSharedMemoryStatus")
    yield GrpcCall("no region x", "SystemSharedMemoryStatus", {"name": "x"})
    for name, wrong in each_of(
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
    for wrong in each_of(
        *({}, {"shared_memory_offset": {"int64_param": 64}}, {"shared_memory_offset": {"int64_param": -1}}),
        *({"shared_memory_byte_size": {"int64_param": size}} for size in (10, 1 << 30)),
        *({"shared_memory_byte_size": {"string_param": "x"}}, {"shared_memory_region": {"int64_param": 1}}),
        {"shared_memory_region": {"string_param": "nope"}},
    ):
        outputs = [{"name": "image", "parameters": {**parameters, **wrong}}]
        yield GrpcCall(f"to shared memory {wrong}", "ModelInfer", _asking(outputs=outputs))
    parameters |= {"shared_memory_offset": {"int64_param": PROMPT_AT}}
    for size in (len(TEXT), len(TEXT) + 2):
        parameters["shared_memory_byte_size"] = {"int64_param": size}
        prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1], "parameters": dict(parameters)}
        request = {"model_name": "demo", "inputs": [prompt, *_SMALL]}
        yield GrpcCall(f"from shared memory, {size} bytes", "ModelInfer", request)
    yield GrpcCall("unregister x", "SystemSharedMemoryUnregister", {"name": "x"})
    yield GrpcCall("unregister all", "SystemSharedMemoryUnregister")
