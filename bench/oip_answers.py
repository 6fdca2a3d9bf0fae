"""What a server answers to calls of the Open Inference Protocol, described so that two servers can be compared."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import secrets
import time
import zlib
from multiprocessing import shared_memory
from typing import TYPE_CHECKING, Any

from .oip_grpc_calls import grpc_calls
from .oip_http_calls import HEADER_LENGTH, MEMORY_BYTES, PROMPT_AT, TEXT, http_calls

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .oip_grpc_calls import GrpcCall
    from .oip_http_calls import HttpCall

_KEPT = {"name", "datatype", "shape", "model_name", "model_version", "id", "state", "byte_size", "offset", "dims"}
"""Fields whose values are compared, and not their types alone."""


def answers(http_address: str, grpc_address: str) -> dict[str, Any]:
    """Make all calls to a server of a model called demo, and describe its answers.

    Parameters
    ----------
    http_address, grpc_address
        Such as ``127.0.0.1:8000``; the server runs on this machine and shares memory.

    """
    with _memory() as key:
        found = {f"http {call.name}": _over_http(http_address, call) for call in http_calls(key)}
        found |= _over_grpc(grpc_address, list(grpc_calls(key)))
    return found


@contextlib.contextmanager
def _memory() -> Iterator[str]:
    """Make shared memory with a prompt in it, and give its key."""
    memory = shared_memory.SharedMemory(f"sdrt-{secrets.token_hex(8)}", create=True, size=MEMORY_BYTES)
    assert memory.buf is not None
    memory.buf[PROMPT_AT : PROMPT_AT + len(TEXT)] = TEXT
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
