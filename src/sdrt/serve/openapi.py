"""The operations that are served, and the OpenAPI document that describes them: both of one list."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from starlette.routing import Route

from .._version import __version__

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from .schema import Schema

ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

INFERENCE_ERROR: Schema = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_ERRORS = {"Error": ERROR, "InferenceError": INFERENCE_ERROR}

_MEANINGS = {
    400: "The request makes no sense; `param` names the field where there is one.",
    401: "The key is missing or wrong.",
    403: "The Host or Origin header is none of this server's, or it does not share memory.",
    404: "There is no such model, or nothing of that name.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not JSON, or in an encoding that is not known.",
    429: "The queue is full; Retry-After tells when to come back.",
    500: "The server failed.",
    503: "The server is loading or about to end, or out of memory.",
}
_WITH_RETRY = {429, 503}


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    Attributes
    ----------
    method, path
        As Starlette has them, with parameters in braces.
    name
        Its ``operationId``.
    summary
        What it does, in a line.
    answer
        The handler.
    replies
        For each status of success its description, and its schema by media type.
    body
        The schema of the request's JSON, if there is one.
    optional_body
        Whether the body may be left out.
    binary
        Whether the body may be ``application/octet-stream`` as well.
    headers
        Those of the request that mean something, each with its schema.
    errors
        Statuses that are answered with an error.
    error
        The schema of those, by its name: ``Error`` or ``InferenceError``.
    open
        Whether it is answered without a key.

    """

    method: str
    path: str
    name: str
    summary: str
    answer: Callable[[Request], Awaitable[Response]]
    replies: Mapping[int, tuple[str, Mapping[str, Schema]]]
    body: Schema | None = None
    optional_body: bool = False
    binary: bool = False
    headers: Mapping[str, Schema] = field(default_factory=dict)
    errors: tuple[int, ...] = ()
    error: Literal["Error", "InferenceError"] = "Error"
    open: bool = False


def routes(operations: Sequence[Operation]) -> list[Route]:
    """Make Starlette's routes."""
    return [Route(each.path, each.answer, methods=[each.method]) for each in operations]


def document(operations: Sequence[Operation], *, key: bool, hosts: bool) -> dict[str, Any]:
    """Describe operations in OpenAPI 3.1.

    Parameters
    ----------
    operations
        All that are served.
    key
        Whether clients need one.
    hosts
        Whether the Host header is looked at.

    """
    always = (*((403,) if hosts else ()), 500)
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        guarded = key and not each.open
        # A name with a slash in it is another path.
        errors = sorted({*each.errors, *always, *((401,) if guarded else ()), *((404,) if "{" in each.path else ())})
        entry: dict[str, Any] = {
            "operationId": each.name,
            "summary": each.summary,
            "responses": {
                **{str(status): _reply(text, content) for status, (text, content) in each.replies.items()},
                **{str(status): _error(status, each.error) for status in errors if status not in each.replies},
            },
        }
        if each.body is not None:
            content = {"application/json": {"schema": each.body}}
            if each.binary:
                content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
            entry["requestBody"] = {"required": not each.optional_body, "content": content}
        if parameters := _parameters(each):
            entry["parameters"] = parameters
        if guarded:
            entry["security"] = [{"key": []}]
        paths.setdefault(each.path, {})[each.method.lower()] = entry
    components: dict[str, Any] = {"schemas": _ERRORS}
    if key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    info = {"title": "sdrt", "version": __version__, "description": "Pictures from prompts, with Stable Diffusion v1."}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    in_path = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return in_path + [
        {"name": name, "in": "header", "required": False, "schema": schema}
        for name, schema in operation.headers.items()
    ]


def _reply(text: str, content: Mapping[str, Schema]) -> dict[str, Any]:
    return {"description": text, "content": {kind: {"schema": schema} for kind, schema in content.items()}}


def _error(status: int, schema: str) -> dict[str, Any]:
    reply = _reply(_MEANINGS[status], {"application/json": {"$ref": f"#/components/schemas/{schema}"}})
    if status in _WITH_RETRY:
        reply["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return reply
