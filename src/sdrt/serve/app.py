"""The application: every operation that is served, below one shell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Router

from . import images_api, native, oip, page
from .http import SOON_S, JSONAnswer, Shell
from .openapi import Operation, document, routes

if TYPE_CHECKING:
    from starlette.requests import Request

    from .models import Model
    from .oip_infer import Inference
    from .schema import Schema
    from .service import Service

_TEXT: Schema = {"type": "string"}
_STATE: Schema = {
    "type": "object",
    "required": ["status", "models"],
    "properties": {
        "status": {"type": "string", "enum": ["loading", "ready", "draining"]},
        "models": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "shares_steps"],
                "properties": {
                    "id": _TEXT,
                    "shares_steps": {
                        "type": "boolean",
                        "description": "Whether pictures share calls of the U-Net; found out when the model is loaded.",
                    },
                },
            },
        },
    },
}
_ALIVE: Schema = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"type": "string", "enum": ["ok"]}},
}
_MODEL: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": _TEXT,
        "object": {"type": "string", "enum": ["model"]},
        "created": {"type": "integer"},
        "owned_by": _TEXT,
    },
}
_MODELS: Schema = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"type": "string", "enum": ["list"]}, "data": {"type": "array", "items": _MODEL}},
}


def application(service: Service, inference: Inference, *, key: str | None, hosts: frozenset[str] | None) -> Shell:
    """Put the server's HTTP side together.

    Parameters
    ----------
    service
        What answers.
    inference
        What answers in the Open Inference Protocol.
    key, hosts
        As `Shell`.

    """
    served = [
        page.operation(),
        images_api.operation(service),
        *native.operations(service),
        *oip.operations(inference),
        *_models(service),
        *_health(service),
    ]
    description: dict[str, Any] = {}

    async def openapi(_: Request) -> Response:
        return JSONAnswer(description)

    reply = {200: ("OpenAPI 3.1.", {"application/json": {"type": "object"}})}
    served.append(Operation("GET", "/openapi.json", "describe", "Describe all this.", openapi, reply))
    description |= document(served, key=key is not None, hosts=hosts is not None)
    open_paths = frozenset(each.path for each in served if each.open)
    router = Router(routes(served), redirect_slashes=False, default=_not_found)
    return Shell(router, service.metrics, key=key, hosts=hosts, open_paths=open_paths)


async def _not_found(scope: Any, _receive: Any, _send: Any) -> None:
    raise HTTPException(404, f"there is nothing at {scope['path'][:200]!r}: /openapi.json lists what there is")


def _models(service: Service) -> list[Operation]:
    def facts(model: Model) -> dict[str, Any]:
        return {"id": model.name, "object": "model", "created": model.created, "owned_by": "sdrt"}

    async def list_models(_: Request) -> Response:
        return JSONAnswer({"object": "list", "data": [facts(model) for model in service.models]})

    async def retrieve_model(request: Request) -> Response:
        return JSONAnswer(facts(service.model(request.path_params["model"])))

    several = {200: ("The models.", {"application/json": _MODELS})}
    one = {200: ("The model.", {"application/json": _MODEL})}
    return [
        Operation("GET", "/v1/models", "listModels", "List the models.", list_models, several),
        Operation("GET", "/v1/models/{model}", "retrieveModel", "Find a model.", retrieve_model, one, errors=(404,)),
    ]


def _health(service: Service) -> list[Operation]:
    async def alive(_: Request) -> Response:
        return JSONAnswer({"status": "ok"})

    async def ready(_: Request) -> Response:
        state = service.state
        models = [{"id": model.name, "shares_steps": model.joins} for model in service.models]
        answer = JSONAnswer({"status": state, "models": models}, 200 if state == "ready" else 503)
        if state != "ready":
            answer.headers["retry-after"] = str(SOON_S)
        return answer

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    state = {"application/json": _STATE}
    figures = {200: ("Figures for Prometheus.", {"text/plain": _TEXT})}
    return [
        Operation(
            "GET",
            "/healthz",
            "isAlive",
            "Tell whether the process answers.",
            alive,
            {200: ("It does.", {"application/json": _ALIVE})},
            open=True,
        ),
        Operation(
            "GET",
            "/readyz",
            "isReady",
            "Tell whether pictures are made.",
            ready,
            {200: ("They are.", state), 503: ("Not yet, or no more.", state)},
            open=True,
        ),
        Operation("GET", "/metrics", "metrics", "Give the server's figures.", metrics, figures),
    ]
