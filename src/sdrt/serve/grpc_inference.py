"""Inference over gRPC: requests and answers as messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .grpc_messages import message_class
from .http import RefusalError
from .oip_infer import InferenceRequest, RequestedOutput, all_outputs, check_parameters
from .oip_model import VERSION
from .oip_tensors import InputTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from google.protobuf.message import Message

    from .oip_infer import OutputTensor
    from .shared_memory import Regions, View

_CONTENTS = {
    "BYTES": "bytes_contents",
    "FP32": "fp32_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
}
"""Where a tensor's elements are, by its datatype."""
_ALLOWED = "triton_enable_empty_final_response"
"""Of the reserved parameters the one for streams; here every answer is a final one."""
_FINAL = "triton_final_response"

InferRequest: Any = message_class("ModelInferRequest")
InferResponse: Any = message_class("ModelInferResponse")
StreamInferResponse: Any = message_class("ModelStreamInferResponse")


def read_inference(message: Any, regions: Regions) -> InferenceRequest:
    """Take a request for inference apart.

    Parameters
    ----------
    message
        A ``ModelInferRequest``.
    regions
        Where shared memory is looked up.

    Raises
    ------
    RefusalError, RegionError
        It makes no sense.

    """
    parameters = _parameters(message.parameters)
    parameters.pop(_ALLOWED, None)
    check_parameters(parameters)
    raw = iter(message.raw_input_contents) if message.raw_input_contents else None
    inputs = [_input(tensor, raw, regions) for tensor in message.inputs]
    if raw is not None and next(raw, None) is not None:
        raise RefusalError(400, "there are more raw_input_contents than inputs: expected one for each")
    outputs = [_output(tensor, regions) for tensor in message.outputs]
    return InferenceRequest(message.model_name, message.model_version, message.id, inputs, outputs or all_outputs())


def _parameters(given: Any) -> dict[str, Any]:
    parameters = {}
    for name, value in given.items():
        if (kind := value.WhichOneof("parameter_choice")) is None:
            raise RefusalError(400, f"parameter {name[:100]!r} is empty: expected a value")
        parameters[name] = getattr(value, kind)
    return parameters


def _input(tensor: Any, raw: Iterator[bytes] | None, regions: Regions) -> InputTensor:
    parameters = _parameters(tensor.parameters)
    name = tensor.name[:100]
    content: list[Any] | bytes | View
    if "shared_memory_region" in parameters:
        content = _shared(parameters, f"input {name!r}", regions)
    elif raw is not None:
        if tensor.HasField("contents"):
            raise RefusalError(
                400, f"input {name!r} has contents and there are raw_input_contents: expected one of them"
            )
        if (part := next(raw, None)) is None:
            raise RefusalError(400, f"input {name!r} has no data: expected as many raw_input_contents as inputs")
        content = part
    else:
        content = []
        for field, values in tensor.contents.ListFields():
            if field.name != _CONTENTS.get(tensor.datatype):
                raise RefusalError(
                    400,
                    f"input {name!r} is of datatype {tensor.datatype[:100]!r} and has {field.name}: expected others",
                )
            content = list(values)
    return InputTensor(tensor.name, tensor.datatype, tuple(tensor.shape), content)


def _output(tensor: Any, regions: Regions) -> RequestedOutput:
    parameters = _parameters(tensor.parameters)
    what = f"output {tensor.name[:100]!r}"
    if "classification" in parameters:
        raise RefusalError(400, f"{what} holds no classes: leave classification out")
    if "shared_memory_region" not in parameters:
        return RequestedOutput(tensor.name)
    return RequestedOutput(tensor.name, target=_shared(parameters, what, regions))


def _shared(parameters: dict[str, Any], what: str, regions: Regions) -> View:
    region = parameters["shared_memory_region"]
    offset, size = parameters.get("shared_memory_offset", 0), parameters.get("shared_memory_byte_size")
    if type(region) is not str or type(offset) is not int or type(size) is not int:
        raise RefusalError(
            400,
            f"{what} has shared memory parameters of a wrong type: expected shared_memory_region as string_param, "
            "shared_memory_byte_size and, if need be, shared_memory_offset as int64_param",
        )
    return regions.view(region, offset, size)


def write_inference(request: InferenceRequest, tensors: Sequence[OutputTensor]) -> Message:
    """Make the answer, a ``ModelInferResponse``; what went to shared memory is empty in it."""
    answer = InferResponse(model_name=request.model, model_version=VERSION, id=request.id)
    for tensor in tensors:
        answer.outputs.add(name=tensor.metadata.name, datatype=tensor.metadata.datatype, shape=tensor.array.shape)
        answer.raw_output_contents.append(tensor.array.tobytes() if tensor.in_answer else b"")
    made: Message = answer
    return made


def in_stream(answer: Any) -> Message:
    """Make what a stream sends for an answer: there is one to each request."""
    answer.parameters[_FINAL].bool_param = True
    made: Message = StreamInferResponse(infer_response=answer)
    return made


def error_in_stream(request_id: str, message: str) -> Message:
    """Make what a stream sends for a request that failed."""
    made: Message = StreamInferResponse(error_message=message, infer_response=InferResponse(id=request_id))
    return made
