"""A server's life: listen, load, answer, and end without leaving anybody waiting."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn

from ..errors import SdrtWarning
from ..runtime.pipeline import load
from .address import listen_on_path, listen_on_port
from .app import application
from .heap import use_one_heap
from .logs import log, set_up
from .oip_infer import Inference
from .parent import watch
from .service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ..runtime.pipeline import Pipeline
    from .address import Listener
    from .grpc_service import GrpcService

_SLOW_READERS_S = 10
_HURRIED = 1


@dataclass(frozen=True)
class Settings:
    """What `sdrt serve` was told.

    Attributes
    ----------
    bundles
        Names or folders; None for the newest that this machine can run.
    backend
        What runs ONNX bundles.
    host, port
        Where to listen; not looked at if there is `uds`.
    grpc_port
        Of gRPC on the same host; None for none.
    uds
        Path of a Unix socket.
    parent
        A process that this one ends with.
    key
        What clients have to send.
    most_at_once, places
        How many pictures are made at once, and how many may wait.
    largest
        Width and height in pixels.
    allow_shared_memory
        Whether clients may register regions of it.
    log_format
        ``text`` or ``json``.

    """

    bundles: tuple[str | None, ...]
    backend: str
    host: str
    port: int
    grpc_port: int | None
    uds: Path | None
    parent: int | None
    key: str | None
    most_at_once: int
    places: int
    largest: tuple[int, int] | None
    allow_shared_memory: bool
    log_format: str


def serve(settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until a signal comes.

    Parameters
    ----------
    settings
        Of the command line.
    say
        Given the one line that tells the address, once requests are answered there.

    Raises
    ------
    SdrtError
        It cannot be done as set, or a bundle turned out not to run.

    """
    use_one_heap()
    with ExitStack() as stack:
        pipelines = [stack.enter_context(load(bundle, backend=settings.backend)) for bundle in settings.bundles]
        if settings.uds is None:
            listener = listen_on_port(settings.host, settings.port, has_key=settings.key is not None)
        else:
            listener = listen_on_path(settings.uds)
        stack.callback(listener.remove)
        set_up(settings.log_format)
        warnings.showwarning = _log_warning
        asyncio.run(_Life(settings, listener, say).run(pipelines))


def _log_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, SdrtWarning):
        log.warning("%s", message)


class _Server(uvicorn.Server):
    """uvicorn without its handling of signals, which would end in the signal's exit code."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


class _Life:
    """From the first connection to the last."""

    def __init__(self, settings: Settings, listener: Listener, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._listener = listener
        self._say = say
        self._failure: Exception | None = None
        self._grpc: GrpcService | None = None

    async def run(self, pipelines: list[Pipeline]) -> None:
        """Answer until a signal comes, and then what was accepted until then."""
        settings, loop = self._settings, asyncio.get_running_loop()
        if settings.parent is not None:
            watch(settings.parent, self._leave)
        self._service = Service(
            pipelines,
            loop,
            most_at_once=settings.most_at_once,
            places=settings.places,
            largest=settings.largest,
            allow_shared_memory=settings.allow_shared_memory,
        )
        self._ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        hosts = None if settings.key else self._listener.hosts
        inference = Inference(self._service)
        app = application(self._service, inference, key=settings.key, hosts=hosts)
        self._server = _Server(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_SLOW_READERS_S,
            )
        )
        url = self._listener.url
        if settings.grpc_port is not None:
            from .grpc_service import GrpcService  # noqa: PLC0415 - for those who ask for it

            self._grpc = GrpcService(inference, settings.key)
            url += f", gRPC on {await self._grpc.start(settings.host, settings.grpc_port)}"
        loader = threading.Thread(target=self._load, args=(loop,), daemon=True, name="loader")
        loader.start()
        ending = asyncio.ensure_future(self._end())
        names = ", ".join(model.name for model in self._service.models)
        self._say(f"serving {names} on {url}")
        await self._server.serve([self._listener.socket])
        ending.cancel()
        if loader.is_alive():
            # Nothing was accepted yet, and an engine that is being loaded cannot be told to stop.
            self._leave(0)
        if self._failure is not None:
            raise self._failure

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._service.warm_up()
        except Exception as error:  # noqa: BLE001 - raised again where the server ends
            self._failure = error
            loop.call_soon_threadsafe(self._ended.set)
            return
        for model in self._service.models:
            how = "pictures share steps" if model.joins else "one picture after the other"
            log.info("%s is ready: %s", model.name, how, extra={"facts": {"model": model.name, "shares": model.joins}})

    def _stop(self) -> None:
        """Take nothing new and end when all is answered; at the second signal at once."""
        if self._ended.is_set():
            log.error("ended before all was answered")
            self._leave()
        log.info("ending: what was accepted is answered first")
        self._ended.set()

    async def _end(self) -> None:
        await self._ended.wait()
        await asyncio.to_thread(self._service.scheduler.drain)
        if self._grpc is not None:
            await self._grpc.stop(_SLOW_READERS_S)
        # uvicorn waits for the answers that are being sent.
        self._server.should_exit = True

    def _leave(self, code: int = _HURRIED) -> None:
        """End now: loops and engines that run hold nothing that would be left half done."""
        self._listener.remove()
        sys.stderr.flush()
        os._exit(code)
