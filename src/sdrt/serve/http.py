"""What every answer goes through: who may ask, bodies read within limits, errors in one form, one line in the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ..errors import DeviceMemoryError, InputError, SdrtError
from .logs import log
from .scheduler import DrainingError, QueueFullError
from .schema import SchemaError, conform, read_json
from .shared_memory import RegionMissingError, SharedMemoryOffError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Mapping

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .metrics import Metrics
    from .schema import Schema

T = TypeVar("T")

MOST_BYTES = 1 << 20
"""Of a body: a prompt of 32,000 characters takes at most 384,000 in JSON."""
BODY_PATIENCE_S = 30.0
INFERENCE = "/v2"
"""Below this path there is the Open Inference Protocol."""
SOON_S = 5
"""Retry-After while the server loads or ends."""
_CLIENT_GONE = 499
"""For log and metrics alone, as nginx has it: there is nobody to send it to."""
_OF_INPUT: Mapping[type[InputError], int] = {RegionMissingError: 404, SharedMemoryOffError: 403}
"""Statuses for what is wrong with a request other than 400."""


class RefusalError(Exception):
    """A request that is answered with an error, in OpenAI's form.

    Attributes
    ----------
    status
        Of HTTP.
    kind, param, code
        ``type``, ``param`` and ``code`` of OpenAI's error object.
    headers
        Sent with it.

    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = headers or {}

    def content(self, path: str = "") -> dict[str, Any]:
        """Give the body: in OpenAI's form, or where the Open Inference Protocol is spoken in that one's."""
        if path == INFERENCE or path.startswith(f"{INFERENCE}/"):
            return {"error": str(self)}
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class ClientGoneError(Exception):
    """Whoever asked has closed the connection."""


class JSONAnswer(Response):
    """JSON in ASCII, since a message may quote half a surrogate pair, which UTF-8 cannot carry."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Write it down."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Stream(Response):
    """An answer in parts, until the last one is sent or the client goes away.

    Parameters
    ----------
    parts
        Text in ASCII, or bytes; closed in either case.
    media_type
        What they are.

    """

    def __init__(self, parts: AsyncGenerator[str] | AsyncGenerator[bytes], media_type: str) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._parts = parts

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        await until_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._parts) as parts:
            async for part in parts:
                body = part.encode("ascii") if isinstance(part, str) else part
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Wait for work that a client waits for, and cancel it when that client closes the connection.

    Parameters
    ----------
    receive
        ASGI's; the body must have been read.
    work
        What is to be done.

    Raises
    ------
    ClientGoneError
        It went away.

    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (gone, task):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_object(request: Request, schema: Schema, refused: Mapping[str, str]) -> dict[str, Any]:
    """Read a request's JSON and hold it against its schema.

    Parameters
    ----------
    request
        Its body is read here.
    schema
        Of an object.
    refused
        Fields that clients may send and that make no sense here, and why.

    Raises
    ------
    RefusalError, SchemaError
        It is of another type, too large, too slow in coming, no JSON, or not as the schema has it.

    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusalError(415, f"the content type is {kind[:60]!r}: expected application/json")
    body = read_json(await read_body(request))
    if isinstance(body, dict) and (name := next((name for name in refused if name in body), None)):
        message = f"{name} makes no sense here: {refused[name]}; leave it out"
        raise RefusalError(400, message, param=name, code="unsupported_parameter")
    fields: dict[str, Any] = conform(schema, body)
    return fields


async def read_body(request: Request) -> bytes:
    """Read a request's body.

    Raises
    ------
    RefusalError
        It is too large, or too slow in coming.

    """
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    # A number that is too long to be one is too large as well.
    if len(declared) > 15 or int(declared) > MOST_BYTES:
        raise too_large()
    try:
        async with asyncio.timeout(BODY_PATIENCE_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise too_large()
    except TimeoutError:
        raise RefusalError(408, f"the body did not come within {BODY_PATIENCE_S:g} seconds: send it again") from None
    return bytes(body)


def too_large() -> RefusalError:
    """Refuse a body of more than `MOST_BYTES`."""
    return RefusalError(413, f"the body is too large: expected at most {MOST_BYTES} bytes")


def refusal_of(error: Exception) -> RefusalError:  # noqa: PLR0911 - one for each kind of error
    """Say in OpenAI's form what went wrong."""
    match error:
        case RefusalError():
            return error
        case SchemaError():
            return RefusalError(400, str(error), param=error.where, code="unknown_parameter" if error.unknown else None)
        case InputError():
            return RefusalError(_OF_INPUT.get(type(error), 400), str(error))
        case QueueFullError():
            headers = {"Retry-After": str(error.retry_after)}
            return RefusalError(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers)
        case DrainingError():
            return later(str(error), "draining")
        case DeviceMemoryError() | MemoryError():
            return RefusalError(503, str(error) or "out of memory", kind="server_error", code="out_of_memory")
        case SdrtError():
            return RefusalError(500, str(error), kind="server_error")
        case HTTPException():
            return RefusalError(error.status_code, error.detail, headers=error.headers)
        case _:
            return RefusalError(500, "the server failed: its log says why", kind="server_error")


def told(error: Exception) -> RefusalError:
    """Say what went wrong, and log it if it is the server's own fault: not that it is to be asked again later."""
    refusal = refusal_of(error)
    if refusal.status >= 500 and "Retry-After" not in refusal.headers:
        log.error("%s", refusal, exc_info=None if isinstance(error, SdrtError | RefusalError) else error)
    return refusal


def later(message: str, code: str) -> RefusalError:
    """Ask to come back, since the server is not at work yet or no more."""
    return RefusalError(503, message, kind="server_error", code=code, headers={"Retry-After": str(SOON_S)})


class Shell:
    """The outermost layer around the application.

    Parameters
    ----------
    app
        What answers.
    metrics
        Where answers are counted.
    key
        What clients have to send as ``Authorization: Bearer``; None if they need not.
    hosts
        The names under which the server may be called; None for any. A page from elsewhere could otherwise have its
        own name resolve to this machine and so read the answers.
    open_paths
        What is answered without a key.

    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        key: str | None,
        hosts: frozenset[str] | None,
        open_paths: frozenset[str],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._key = None if key is None else key.encode()
        self._hosts = hosts
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began = time.perf_counter()
        number = uuid.uuid4().hex
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        scope["app"] = self  # without one Starlette answers a wrong method in a form of its own
        try:
            self._admit(scope)
            await self._app(scope, receive, send_on)
        except (ClientGoneError, ClientDisconnect):
            status = _CLIENT_GONE
        except Exception as error:
            refusal = told(error)
            if status:
                raise
            content = refusal.content(scope["path"])
            await JSONAnswer(content, refusal.status, refusal.headers)(scope, receive, send_on)
        finally:
            # An answer that stopped in the middle is one whose client went away.
            self._record(scope, status or _CLIENT_GONE, time.perf_counter() - began, number)

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._hosts is not None and _host(headers.get(b"host", b"").decode("latin-1")) not in self._hosts:
            raise RefusalError(403, f"this server is not called so: expected one of {', '.join(sorted(self._hosts))}")
        origin = headers.get(b"origin")
        if self._hosts is not None and origin is not None:
            page = _host(origin.decode("latin-1").partition("://")[2])
            if page not in self._hosts:
                raise RefusalError(403, "a page from elsewhere asks: expected one of this server")
        if self._key is None or scope["path"] in self._open_paths:
            return
        if not is_key(headers.get(b"authorization", b""), self._key):
            raise RefusalError(
                401,
                "the key is missing or wrong: expected Authorization: Bearer and the server's SDRT_API_KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _record(self, scope: Scope, status: int, seconds: float, number: str) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.requests.labels(scope["method"] if route != "none" else "any", route, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        client = scope["client"][0] if scope.get("client") else "-"
        facts = {"client": client, "method": scope["method"], "path": scope["path"][:200], "status": status}
        # Whoever watches over the server asks every few seconds.
        level = logging.DEBUG if scope["path"] in self._open_paths and status < 400 else logging.INFO
        log.log(
            level,
            '%s "%s %s" %d %.3f s',
            *facts.values(),
            seconds,
            extra={"facts": {**facts, "seconds": round(seconds, 6), "request_id": number}},
        )


def is_key(authorization: bytes, key: bytes) -> bool:
    """Tell, in a time that does not depend on the key, whether an Authorization header carries it."""
    scheme, _, given = authorization.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key)


def _host(header: str) -> str:
    """Give the name of a Host header without its port."""
    name, _, port = header.strip().lower().rpartition(":")
    return (name if name and port.isdigit() else header.strip().lower()).strip("[]")
