"""The gRPC service of the Open Inference Protocol: what `oip` answers over HTTP, under the same rules."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from .address import listen_on_port
from .grpc_calls import UnsupportedError, calls
from .grpc_inference import InferRequest, error_in_stream, in_stream, read_inference, write_inference
from .grpc_messages import SERVICE, message_class
from .http import MOST_BYTES, RefusalError, is_key, told
from .logs import log
from .shared_memory import RegionExistsError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from google.protobuf.message import Message

    from .oip_infer import Inference

_Code = grpc.StatusCode
_CODES = {
    400: _Code.INVALID_ARGUMENT,
    401: _Code.UNAUTHENTICATED,
    403: _Code.PERMISSION_DENIED,
    404: _Code.NOT_FOUND,
    429: _Code.RESOURCE_EXHAUSTED,
    503: _Code.UNAVAILABLE,
}
"""gRPC's words for HTTP's statuses."""
_OPEN = frozenset({"ServerLive", "ServerReady"})
"""What is answered without a key."""
_MOST_AHEAD = 8
"""Requests of one stream that are at work, or answered and not fetched."""
_LONGEST_MESSAGE = 2000
_OPTIONS = [("grpc.max_receive_message_length", MOST_BYTES), ("grpc.so_reuseport", 0)]


class GrpcService:
    """The service, on a port of its own.

    Parameters
    ----------
    inference
        What answers.
    key
        What clients have to send as ``authorization: Bearer`` in their metadata; None if they need not.

    """

    def __init__(self, inference: Inference, key: str | None) -> None:
        self._inference = inference
        self._metrics = inference.service.metrics
        self._key = None if key is None else key.encode()
        self._calls = calls(inference)
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # of lines on standard error that are none of the log's
        self._server = grpc.aio.server(options=_OPTIONS)
        handlers = {method.name: self._handler(method) for method in SERVICE.methods}
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)])

    async def start(self, host: str, port: int) -> str:
        """Listen, and give the address.

        Parameters
        ----------
        host
            One that HTTP listens on.
        port
            0 for any that is free.

        Raises
        ------
        SdrtError
            The port is taken, or not for this user.

        """
        # gRPC says little about what is wrong with a port, and that in lines of its own.
        probe = listen_on_port(host, port, has_key=True, option="--grpc-port").socket
        number = probe.getsockname()[1]
        probe.close()
        address = f"[{host}]:{number}" if ":" in host else f"{host}:{number}"
        self._server.add_insecure_port(address)
        await self._server.start()
        return address

    async def stop(self, patience_s: float) -> None:
        """Take nothing new, and wait for the answers that are being sent."""
        await self._server.stop(patience_s)

    # Messages come as bytes: what cannot be read is the client's fault, and gRPC would call it the server's.

    def _handler(self, method: Any) -> Any:
        name, kind = method.name, message_class(method.input_type.name)

        async def call(data: bytes, context: Any) -> bytes:
            async with self._answering(name, context):
                answer: bytes = (await self._calls[name](_read(kind, data))).SerializeToString()
                return answer

        async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async with self._answering(name, context):
                async for answer in self._in_turn(requests):
                    yield answer.SerializeToString()

        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(call)

    @asynccontextmanager
    async def _answering(self, name: str, context: Any) -> AsyncGenerator[None]:
        """Let in whom the key lets in, tell errors as gRPC does, and write a line in the log."""
        began = time.perf_counter()
        code = _Code.CANCELLED
        try:
            self._admit(name, context)
            yield
            code = _Code.OK
        except Exception as error:  # noqa: BLE001 - it is told to the client
            code, message, more = _refusal(error)
            await context.abort(code, message, more)
        finally:
            self._record(name, context, code, time.perf_counter() - began)

    def _admit(self, name: str, context: Any) -> None:
        if self._key is None or name in _OPEN:
            return
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not is_key(given.encode() if isinstance(given, str) else given, self._key):
            raise RefusalError(
                401, "the key is missing or wrong: expected authorization: Bearer and the server's SDRT_API_KEY"
            )

    async def _in_turn(self, requests: AsyncIterator[bytes]) -> AsyncGenerator[Message]:
        """Give the answers to a stream's requests in their order, working on some at once."""
        waiting: asyncio.Queue[asyncio.Task[Message] | None] = asyncio.Queue(_MOST_AHEAD)
        tasks: set[asyncio.Task[Any]] = set()

        async def take() -> None:
            with suppress(Exception):  # of a client that went away, which ends this stream as well
                async for data in requests:
                    task = asyncio.create_task(self._one_of_a_stream(data))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    await waiting.put(task)
            await waiting.put(None)

        reader = asyncio.create_task(take())
        try:
            while (task := await waiting.get()) is not None:
                yield await task
        finally:
            left = [reader, *tasks]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _one_of_a_stream(self, data: bytes) -> Message:
        request: Any = InferRequest()
        try:
            request = _read(InferRequest, data)
            asked = read_inference(request, self._inference.service.regions)
            return in_stream(write_inference(asked, await self._inference.infer(asked)))
        except Exception as error:  # noqa: BLE001 - it is told to the client, and the stream goes on
            return error_in_stream(request.id, _refusal(error)[1])

    def _record(self, name: str, context: Any, code: grpc.StatusCode, seconds: float) -> None:
        self._metrics.grpc_requests.labels(name, code.name).inc()
        self._metrics.grpc_seconds.labels(name).observe(seconds)
        facts = {"client": context.peer(), "method": "gRPC", "path": name, "status": code.name}
        level = logging.DEBUG if name in _OPEN and code is _Code.OK else logging.INFO
        log.log(
            level,
            '%s "%s %s" %s %.3f s',
            *facts.values(),
            seconds,
            extra={"facts": {**facts, "seconds": round(seconds, 6)}},
        )


def _read(kind: type[Any], data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise RefusalError(400, f"the message cannot be read: expected a {kind.DESCRIPTOR.name}") from None


def _refusal(error: Exception) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Give the code, the message and the metadata that tell a client of an error."""
    if isinstance(error, UnsupportedError):
        return _Code.UNIMPLEMENTED, str(error), ()
    refusal = told(error)
    code = _Code.ALREADY_EXISTS if isinstance(error, RegionExistsError) else _CODES.get(refusal.status, _Code.INTERNAL)
    more = tuple((name.lower(), value) for name, value in refusal.headers.items() if name == "Retry-After")
    # Half a surrogate pair cannot be sent.
    message = str(refusal)[:_LONGEST_MESSAGE].encode(errors="backslashreplace").decode()
    return code, message, more
