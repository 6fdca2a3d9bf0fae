"""The Open Inference Protocol, version 2, over HTTP, with Triton's extensions as far as they make sense here.

https://github.com/kserve/open-inference-protocol describes it, and `docs/protocol` of
https://github.com/triton-inference-server/server the extensions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from .http import INFERENCE, JSONAnswer, RefusalError, until_gone
from .oip_http import HEADER_LENGTH, answer, read_body_inflated, read_inference
from .oip_infer import MODELS_ARE_FIXED, Inference
from .oip_memory import operations as memory_operations
from .oip_model import configuration, metadata
from .oip_schemas import CONFIGURATION, INDEX, INFER, INFERENCES, MODEL, READY_ONLY, SERVER, STATISTICS
from .openapi import Operation
from .schema import conform, read_json

if TYPE_CHECKING:
    from starlette.requests import Request

    from .schema import Schema

_MODEL = f"{INFERENCE}/models/{{model}}"
_NOTHING: dict[str, Schema] = {}
_COMPRESSION: Schema = {"type": "string", "enum": ["gzip", "deflate", "identity"]}


def operations(inference: Inference) -> list[Operation]:
    """Offer all of it."""
    served = [*_server(inference), *_repository(inference), *memory_operations(inference.service.regions)]
    for each in _model(inference):
        served.append(each)
        # Triton has each of them for one version as well, of which there is one.
        path = each.path.replace("{model}", "{model}/versions/{version}")
        served.append(replace(each, path=path, name=f"{each.name}Version"))
    return [replace(each, error="InferenceError") for each in served]


def _server(inference: Inference) -> list[Operation]:
    async def describe(_: Request) -> Response:
        return JSONAnswer(inference.server_metadata())

    async def live(_: Request) -> Response:
        return Response()

    async def ready(_: Request) -> Response:
        return _ready(inference.ready, "the server is not ready: try again in a moment")

    metadata = {200: ("Name, version and extensions.", {"application/json": SERVER})}
    return [
        Operation("GET", INFERENCE, "serverMetadata", "Describe the server.", describe, metadata),
        Operation(
            "GET",
            f"{INFERENCE}/health/live",
            "serverLive",
            "Tell whether the process answers.",
            live,
            {200: ("It does.", _NOTHING)},
            open=True,
        ),
        Operation(
            "GET",
            f"{INFERENCE}/health/ready",
            "serverReady",
            "Tell whether pictures are made.",
            ready,
            {200: ("They are.", _NOTHING)},
            errors=(400,),
            open=True,
        ),
    ]


def _ready(holds: bool, otherwise: str) -> Response:
    if not holds:
        raise RefusalError(400, otherwise)
    return Response()


def _repository(inference: Inference) -> list[Operation]:
    async def index(request: Request) -> Response:
        body = await read_body_inflated(request)
        given = conform(READY_ONLY, read_json(body)) if body else {}
        return JSONAnswer(inference.index(ready_only=given.get("ready", False)))

    async def refuse(_: Request) -> Response:
        raise RefusalError(400, MODELS_ARE_FIXED)

    async def statistics(_: Request) -> Response:
        return JSONAnswer(inference.statistics("", ""))

    path = f"{INFERENCE}/repository"
    listed = {200: ("The models.", {"application/json": INDEX})}
    figures = {200: ("The figures.", {"application/json": STATISTICS})}
    return [
        Operation(
            "POST",
            f"{path}/index",
            "repositoryIndex",
            "List the models.",
            index,
            listed,
            body=READY_ONLY,
            optional_body=True,
            errors=(400, 408, 413, 415),
        ),
        *(
            Operation(
                "POST",
                f"{path}/models/{{model}}/{what}",
                f"repositoryModel{what.title()}",
                why,
                refuse,
                {},
                errors=(400,),
            )
            for what, why in (("load", "Not done: models are fixed."), ("unload", "Not done: models are fixed."))
        ),
        Operation(
            "GET", f"{INFERENCE}/models/stats", "allStatistics", "Give figures of all models.", statistics, figures
        ),
    ]


def _model(inference: Inference) -> list[Operation]:
    def asked(request: Request) -> tuple[str, str]:
        return request.path_params["model"], request.path_params.get("version", "")

    async def describe(request: Request) -> Response:
        return JSONAnswer(metadata(inference.model(*asked(request))))

    async def ready(request: Request) -> Response:
        return _ready(inference.is_ready(*asked(request)), "the model is not ready, or there is none such")

    async def configure(request: Request) -> Response:
        return JSONAnswer(configuration(inference.model(*asked(request))))

    async def statistics(request: Request) -> Response:
        return JSONAnswer(inference.statistics(*asked(request)))

    async def infer(request: Request) -> Response:
        name, version = asked(request)
        inference.model(name, version)
        body = await read_body_inflated(request)
        length = request.headers.get(HEADER_LENGTH)
        wanted = read_inference(name, version, body, length, inference.service.regions)
        tensors = await until_gone(request.receive, inference.infer(wanted))
        return await answer(request, wanted, tensors)

    def operation(what: str, name: str, summary: str, handler: Any, schema: Schema) -> Operation:
        reply = {200: ("The description.", {"application/json": schema})}
        return Operation("GET", f"{_MODEL}{what}", name, summary, handler, reply, errors=(404,))

    return [
        operation("", "modelMetadata", "Describe a model's tensors.", describe, MODEL),
        Operation(
            "GET",
            f"{_MODEL}/ready",
            "modelReady",
            "Tell whether a model makes pictures.",
            ready,
            {200: ("It does.", _NOTHING)},
            errors=(400,),
        ),
        operation("/config", "modelConfig", "Describe a model as Triton does.", configure, CONFIGURATION),
        operation("/stats", "modelStatistics", "Give figures of a model.", statistics, STATISTICS),
        Operation(
            "POST",
            f"{_MODEL}/infer",
            "modelInfer",
            "Make pictures, answered as tensors.",
            infer,
            {
                200: (
                    "The tensors; with binary data behind the JSON if that was asked for.",
                    {
                        "application/json": INFERENCES,
                        "application/octet-stream": {"type": "string", "format": "binary"},
                    },
                )
            },
            body=INFER,
            binary=True,
            headers={
                HEADER_LENGTH: {"type": "integer", "minimum": 1, "description": "Of the JSON, if binary data follows."},
                "Content-Encoding": _COMPRESSION,
            },
            errors=(400, 403, 404, 408, 413, 415, 429, 503),
        ),
    ]
