"""Inference over HTTP: JSON, with binary data behind it or not, compressed or not, both asked and answered."""

from __future__ import annotations

import asyncio
import json
import zlib
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response

from .http import MOST_BYTES, RefusalError, read_body, too_large
from .oip_infer import InferenceRequest, RequestedOutput, all_outputs, check_parameters
from .oip_model import VERSION
from .oip_tensors import InputTensor
from .schema import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.requests import Request

    from .oip_infer import OutputTensor
    from .shared_memory import Regions, View

T = TypeVar("T")

HEADER_LENGTH = "Inference-Header-Content-Length"
_ENCODINGS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""What bodies may be compressed with, and zlib's number for it."""
_NAMES: Mapping[type, str] = {
    str: "a string",
    list: "an array",
    dict: "an object",
    bool: "true or false",
    int: "a number",
}


async def read_body_inflated(request: Request) -> bytes:
    """Read a body, and decompress it if its headers say so.

    Raises
    ------
    RefusalError
        It is too large, also when decompressed; too slow in coming; or not what its headers say.

    """
    body = await read_body(request)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        return body
    if encoding not in _ENCODINGS:
        raise RefusalError(
            415,
            f"the content encoding is {encoding[:60]!r}: expected gzip or deflate",
            headers={"Accept-Encoding": "gzip, deflate"},
        )
    inflate = zlib.decompressobj(_ENCODINGS[encoding])
    try:
        content = inflate.decompress(body, MOST_BYTES + 1)
    except zlib.error:
        raise RefusalError(400, f"the body is not what {encoding} makes: send it as it is") from None
    if len(content) > MOST_BYTES:
        raise too_large()
    if not inflate.eof or inflate.unused_data:
        raise RefusalError(400, f"the body is not one whole {encoding} stream: send it again")
    return content


def read_inference(
    model: str, version: str, body: bytes, header_length: str | None, regions: Regions
) -> InferenceRequest:
    """Take a request for inference apart.

    Parameters
    ----------
    model, version
        From its path.
    body
        JSON, and behind it binary data if `header_length` is given.
    header_length
        Of the JSON, in bytes, as the header has it.
    regions
        Where shared memory is looked up.

    Raises
    ------
    RefusalError, SchemaError, RegionError
        It is no such thing.

    """
    length = len(body)
    if header_length is not None:
        # A longer number is none that fits, and longer ones still are none that Python reads.
        length = int(header_length) if header_length.isdecimal() and len(header_length) < 10 else 0
        if not 0 < length <= len(body):
            raise RefusalError(
                400, f"{HEADER_LENGTH} is {header_length[:60]!r}: expected 1 to {len(body)}, the length of the JSON"
            )
    content = read_json(body[:length])
    if not isinstance(content, dict):
        raise RefusalError(400, "the body is no object: expected inputs and, if need be, id, parameters and outputs")
    parameters = _get(content, "parameters", dict, {})
    check_parameters(parameters)
    by_default = _get(parameters, "binary_data_output", bool, default=False)
    inputs, rest = [], memoryview(body)[length:]
    for number, given in enumerate(_get(content, "inputs", list)):
        tensor, size = _input(given, f"inputs[{number}]", rest, regions)
        inputs.append(tensor)
        rest = rest[size:]
    if rest:
        raise RefusalError(400, f"{len(rest)} bytes of binary data are left over: expected none behind the inputs'")
    outputs = [
        _output(given, f"outputs[{number}]", by_default, regions)
        for number, given in enumerate(_get(content, "outputs", list, []))
    ]
    name = _get(content, "id", str, "")
    return InferenceRequest(model, version, name, inputs, outputs or all_outputs(binary=by_default))


def _get(fields: Any, name: str, kind: type[T], default: T | None = None, where: str = "") -> T:
    """Give a field of an object, of the type that it must have."""
    if not isinstance(fields, dict):
        raise RefusalError(400, f"{where} is of a wrong type: expected an object", param=where)
    what = f"{where}.{name}" if where else name
    value = fields.get(name, default)
    if value is None and name not in fields:
        raise RefusalError(400, f"{what} is missing: expected {_NAMES[kind]}", param=what)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RefusalError(400, f"{what} is of a wrong type: expected {_NAMES[kind]}", param=what)
    return value


def _input(given: Any, where: str, binary: memoryview, regions: Regions) -> tuple[InputTensor, int]:
    """Give a tensor and how many bytes of the binary data are its own."""
    name, datatype = _get(given, "name", str, where=where), _get(given, "datatype", str, where=where)
    shape = _get(given, "shape", list, where=where)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise RefusalError(400, f"{where}.shape holds something else: expected whole numbers of at least 0")
    parameters = _get(given, "parameters", dict, {}, where)
    found = ["data"] if "data" in given else []
    found += [each for each in ("binary_data_size", "shared_memory_region") if each in parameters]
    if len(found) != 1:
        raise RefusalError(
            400,
            f"{where} has {' and '.join(found) or 'no data'}: expected one of data, binary_data_size and "
            "shared_memory_region",
        )
    content: list[Any] | bytes | View
    size = 0
    match found[0]:
        case "data":
            content = _get(given, "data", list, where=where)
        case "binary_data_size":
            size = _get(parameters, "binary_data_size", int, where=f"{where}.parameters")
            if not 0 <= size <= len(binary):
                raise RefusalError(400, f"{where} is to have {size} bytes of binary data: {len(binary)} are left")
            content = bytes(binary[:size])
        case _:
            content = _shared(parameters, where, regions)
    return InputTensor(name, datatype, tuple(shape), content), size


def _output(given: Any, where: str, by_default: bool, regions: Regions) -> RequestedOutput:
    name, parameters = _get(given, "name", str, where=where), _get(given, "parameters", dict, {}, where)
    binary = _get(parameters, "binary_data", bool, by_default, f"{where}.parameters")
    if "classification" in parameters:
        raise RefusalError(400, f"{where} holds no classes: leave classification out")
    if "shared_memory_region" not in parameters:
        return RequestedOutput(name, binary)
    if parameters.get("binary_data"):
        raise RefusalError(400, f"{where} has shared_memory_region and binary_data: expected one of them")
    return RequestedOutput(name, target=_shared(parameters, where, regions))


def _shared(parameters: dict[str, Any], where: str, regions: Regions) -> View:
    where = f"{where}.parameters"
    return regions.view(
        _get(parameters, "shared_memory_region", str, where=where),
        _get(parameters, "shared_memory_offset", int, 0, where),
        _get(parameters, "shared_memory_byte_size", int, where=where),
    )


async def answer(request: Request, asked: InferenceRequest, tensors: Sequence[OutputTensor]) -> Response:
    """Write an answer down, compressed as the client likes it."""
    accepted = request.headers.get("accept-encoding", "")
    return await asyncio.to_thread(_write, asked, tensors, _preferred(accepted))


def _write(asked: InferenceRequest, tensors: Sequence[OutputTensor], encoding: str | None) -> Response:
    outputs, binary = [], bytearray()
    for tensor in tensors:
        output: dict[str, Any] = {
            "name": tensor.metadata.name,
            "datatype": tensor.metadata.datatype,
            "shape": list(tensor.array.shape),
        }
        if tensor.in_answer and tensor.requested.binary:
            output["parameters"] = {"binary_data_size": tensor.array.nbytes}
            binary += tensor.array.data.cast("B")
        elif tensor.in_answer:
            output["data"] = tensor.array.ravel().tolist()
        outputs.append(output)
    content = {"model_name": asked.model, "model_version": VERSION, "outputs": outputs}
    if asked.id:
        content = {"id": asked.id, **content}
    text = json.dumps(content, separators=(",", ":")).encode("ascii")
    headers = {HEADER_LENGTH: str(len(text))} if binary else {}
    body = text + binary
    if encoding is not None:
        deflate = zlib.compressobj(wbits=_ENCODINGS[encoding])
        body = deflate.compress(body) + deflate.flush()
        headers["Content-Encoding"] = encoding
    return Response(body, headers=headers, media_type="application/octet-stream" if binary else "application/json")


def _preferred(accepted: str) -> str | None:
    """Choose from an Accept-Encoding header: the first that is known, as Triton does; None if none is."""
    for part in accepted.lower().split(","):
        name, _, weight = part.partition(";")
        refused = "q=" in weight and not weight.partition("q=")[2].strip(" 0.")
        if name.strip() in _ENCODINGS and not refused:
            return name.strip()
    return None
