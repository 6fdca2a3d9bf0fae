"""Clients of a server that cost little themselves, since they share its cores."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
    from concurrent.futures import Future

GENERATIONS: Final = "/v1/images/generations"
NONE_CAME: Final = 0
UNCONNECTED: Final = -1
_PATIENCE_S = 300.0


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes
    ----------
    number
        Of the request among those that were given.
    status
        Of HTTP; `NONE_CAME` if the connection ended before one came, `UNCONNECTED` if there was none.
    due, ended
        Seconds of `time.monotonic`: when it was to be sent, and when the last byte was there.
    exact
        Whether its picture is the expected one; False as well for an answer that broke off.

    """

    number: int
    status: int
    due: float
    ended: float
    exact: bool = False

    @property
    def seconds(self) -> float:
        """From the moment when it was to be sent, so that a client that is late itself is not excused."""
        return self.ended - self.due


@dataclass(frozen=True)
class Order:
    """A request and the picture that must come of it.

    Attributes
    ----------
    body
        Its fields.
    picture
        The PNG in Base64.

    """

    body: Mapping[str, Any]
    picture: str

    def encoded(self) -> bytes:
        """Write the whole request down; the server closes the connection after the answer."""
        body = json.dumps(self.body).encode()
        lines = (
            f"POST {GENERATIONS} HTTP/1.1",
            "Host: localhost",
            "Connection: close",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        return "\r\n".join((*lines, "", "")).encode() + body

    def is_answered_by(self, body: bytes) -> bool:
        """Tell whether an answer, or a stream's last event, carries the expected picture."""
        if self.body.get("stream"):
            *_, last = body.decode().strip().split("\n\n")
            name, _, data = last.partition("\ndata: ")
            return name == "event: image_generation.completed" and json.loads(data)["b64_json"] == self.picture
        (image,) = json.loads(body)["data"]
        return bool(image["b64_json"] == self.picture)


@dataclass(frozen=True)
class Load:
    """The answers of many clients, and the processor time that the clients took."""

    answers: list[Answer]
    cpu_seconds: float


class _Received(io.BytesIO):
    """Bytes of a connection, as `http.client.HTTPResponse` wants a socket."""

    def makefile(self, _mode: str) -> _Received:
        return self


def parse(received: bytes) -> tuple[int, bytes | None]:
    """Give status and body of what a server sent until it closed the connection; no body if that broke off."""
    response = http.client.HTTPResponse(_Received(received))  # type: ignore[arg-type]  # enough of a socket
    try:
        response.begin()
    except (http.client.HTTPException, ConnectionError):
        return NONE_CAME, None
    try:
        return response.status, response.read()
    except http.client.IncompleteRead:
        return response.status, None


class Crowd:
    """Clients in one event loop.

    Parameters
    ----------
    url
        Of the server.
    orders
        What they ask for.

    """

    def __init__(self, url: str, orders: Sequence[Order]) -> None:
        self._host, _, self._port = url.removeprefix("http://").rpartition(":")
        self._orders = orders
        self._encoded = [order.encoded() for order in orders]
        self._gone = False
        self.answers: list[Answer] = []

    async def ask(self, number: int, due: float) -> None:
        """Open a connection, send a request and wait for its answer."""
        try:
            reader, writer = await asyncio.open_connection(self._host, int(self._port))
        except OSError:
            self._gone = True
            self.answers.append(Answer(number, UNCONNECTED, due, time.monotonic()))
            return
        received = bytearray()
        try:
            writer.write(self._encoded[number])
            async with asyncio.timeout(_PATIENCE_S):
                while chunk := await reader.read(1 << 16):
                    received += chunk
        except (ConnectionError, TimeoutError):
            pass  # what came until then is looked at
        finally:
            writer.transport.abort()
        ended = time.monotonic()
        status, body = parse(bytes(received))
        exact = status == http.HTTPStatus.OK and body is not None and self._orders[number].is_answered_by(body)
        self.answers.append(Answer(number, status, due, ended, exact))

    async def closed(self, clients: int, seconds: float) -> None:
        """Let each of some clients ask again as soon as it is answered."""
        end = time.monotonic() + seconds
        numbers = iter(range(1 << 62))

        async def client() -> None:
            while (now := time.monotonic()) < end:
                await self.ask(next(numbers) % len(self._orders), now)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def open(self, rate: float, seconds: float, seed: int) -> None:
        """Let clients come at random, so many a second however slowly they are answered, each for one request.

        They stop coming when there is no server any more.
        """
        draw = random.Random(seed)  # noqa: S311 - a Poisson process, and no secret
        due = time.monotonic()
        end = due + seconds
        async with asyncio.TaskGroup() as group:
            while (due := due + draw.expovariate(rate)) < end and not self._gone:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(self.ask(draw.randrange(len(self._orders)), due))


@contextmanager
def crowd_beside(
    url: str, orders: Sequence[Order], load: Callable[[Crowd], Coroutine[Any, Any, None]]
) -> Iterator[Future[Load]]:
    """Let clients ask, from a process of their own, while the block runs.

    Parameters
    ----------
    url, orders
        As `Crowd`.
    load
        What they do, such as ``partial(Crowd.closed, clients=8, seconds=10)``.

    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool.submit(_run, url, orders, load)


def _run(url: str, orders: Sequence[Order], load: Callable[[Crowd], Coroutine[Any, Any, None]]) -> Load:
    crowd = Crowd(url, orders)
    before = time.process_time()
    asyncio.run(load(crowd))
    return Load(crowd.answers, time.process_time() - before)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Give median, 99th percentile and maximum of times, in milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(1000 * ordered[math.ceil(share * len(ordered)) - 1], 1) for name, share in at.items()}
