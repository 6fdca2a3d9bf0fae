"""The native protocol: `POST /native/v1/generate`, whose answer is a stream of frames with pixels in them.

embed/PROTOCOL.md describes it; embed/ is its client, for C and C++.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.request import make_request
from . import native_frames as frames
from .fields import COUNT, MODEL, PROMPT, SETTINGS, make_requests, optional
from .http import JSONAnswer, RefusalError, Stream, read_object, told
from .native_frames import MEDIA_TYPE
from .openapi import Operation
from .scheduler import Picture
from .shared_memory import RegionError, SharedMemoryOffError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from concurrent.futures import Future

    from numpy.typing import NDArray
    from PIL.Image import Image
    from starlette.requests import Request
    from starlette.responses import Response

    from ..runtime.loop import Step
    from ..runtime.request import Request as PictureRequest
    from .models import Model
    from .schema import Schema
    from .service import Service
    from .shared_memory import View

_PATIENCE_S = 5.0
"""Between two frames, so that a client can tell a server that is busy from one that hangs."""
_MOST_UNREAD = 4
"""Previews that wait for a slow reader; further ones are left out, and memory so does not grow."""
_CHANNELS = 3
_LARGEST_MEMORY = 2**40

_MEMORY: Schema = {
    "type": ["object", "null"],
    "required": ["key", "byte_size"],
    "additionalProperties": False,
    "properties": {
        "key": {"type": "string", "maxLength": 255, "description": "Of a POSIX shared memory object, such as /pixels."},
        "offset": optional("integer", "In bytes, 0 by default.", minimum=0, maximum=_LARGEST_MEMORY),
        "byte_size": {"type": "integer", "minimum": 1, "maximum": _LARGEST_MEMORY},
    },
}
GENERATE: Schema = {
    "type": "object",
    "required": ["prompt"],
    "additionalProperties": False,
    "properties": {
        "prompt": PROMPT,
        "model": MODEL,
        "n": COUNT,
        "width": optional("integer", "In pixels, a multiple of 8.", minimum=8, maximum=9999),
        "height": optional("integer", "In pixels, a multiple of 8.", minimum=8, maximum=9999),
        **SETTINGS,
        "seed": {**SETTINGS["seed"], "minimum": 0},
        "preview_interval": optional("integer", "A preview after each so many steps.", minimum=1, maximum=1000),
        "pixels": {**_MEMORY, "description": "Where the pictures are to be written, one after the other."},
        "latents": {
            **_MEMORY,
            "description": "Unit gaussians to start from, little-endian float32 of shape (n, 4, height / 8, width / 8) "
            "instead of the seeds'; width and height have to be given.",
        },
    },
}
_COUNTED: Schema = {"type": "integer"}
_MODELS: Schema = {
    "type": "object",
    "required": ["models"],
    "properties": {
        "models": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "created", "width", "height"],
                "properties": {
                    "id": {"type": "string"},
                    "created": {**_COUNTED, "description": "Seconds since 1970."},
                    "width": {**_COUNTED, "description": "Of a picture for which none is asked, in pixels."},
                    "height": {**_COUNTED, "description": "Likewise."},
                },
            },
        }
    },
}
_FRAMES: Schema = {"type": "string", "format": "binary", "description": "Frames, as embed/PROTOCOL.md has them."}


def operations(service: Service) -> list[Operation]:
    """Offer it."""

    async def generate(request: Request) -> Response:
        return await _generate(service, request)

    async def models(_: Request) -> Response:
        return JSONAnswer({"models": [_facts(model) for model in service.models]})

    return [
        Operation(
            "POST",
            "/native/v1/generate",
            "nativeGenerate",
            "Make pictures, answered as pixels.",
            generate,
            {200: ("The steps, previews and pictures as they come about.", {MEDIA_TYPE: _FRAMES})},
            body=GENERATE,
            errors=(400, 403, 404, 408, 413, 415, 429, 503),
        ),
        Operation(
            "GET",
            "/native/v1/models",
            "nativeModels",
            "List the models and their sizes.",
            models,
            {200: ("The models; the first is for requests that name none.", {"application/json": _MODELS})},
        ),
    ]


def _facts(model: Model) -> dict[str, Any]:
    usual = make_request(model.pipeline.bundle.manifest, "", num_inference_steps=1, seed=0)
    return {"id": model.name, "created": model.created, "width": usual.width, "height": usual.height}


async def _generate(service: Service, request: Request) -> Response:
    given = await read_object(request, GENERATE, {})
    fields = {name: value for name, value in given.items() if value is not None}
    count = fields.get("n", 1)
    service.check_ready()
    model = service.model(fields.get("model"))
    service.scheduler.check_room(count)
    # Tables of a thousand steps take milliseconds that others need not wait for.
    order = await asyncio.to_thread(Order, service, model, fields, count)
    waiting = service.scheduler.depth
    service.scheduler.submit(order.pictures)
    return Stream(order.frames(waiting), MEDIA_TYPE)


class Order:
    """What one request asked for, from its fields to its frames.

    Parameters
    ----------
    service
        The server.
    model
        That makes the pictures.
    fields
        Of the request, checked against the schema; those that are null left out.
    count
        How many pictures.

    Raises
    ------
    RefusalError, InputError
        The fields make no sense for this model, or memory cannot be shared as asked.

    """

    def __init__(self, service: Service, model: Model, fields: dict[str, Any], count: int) -> None:
        self._loop = service.loop
        self._model = model
        tokens = model.pipeline.tokenizer.count
        self._tokens = {name: tokens(fields[name]) for name in ("prompt", "negative_prompt") if name in fields}
        requests = make_requests(model, fields, count, latents=_latents(service, model, fields, count))
        self._first = first = requests[0]
        service.check_size(model, first.width, first.height)
        self._pixels = _pixels(service, fields, count, first)
        every = fields.get("preview_interval", len(first.table))
        previews = frozenset(range(every - 1, len(first.table) - 1, every))
        self._made: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        self._unread = threading.Semaphore(_MOST_UNREAD)
        self._began = time.perf_counter()
        self.pictures = [
            Picture(model, request, previews, partial(self._show, number), partial(self._stepped, number))
            for number, request in enumerate(requests)
        ]
        self._steps_done = [0] * count
        for number, picture in enumerate(self.pictures):
            picture.done.add_done_callback(partial(self._finish, number))

    # The following three are called by the threads that make the pictures.

    def _stepped(self, number: int, step: Step) -> None:
        self._steps_done[number] = step.index + 1
        self._send(frames.step(number, step))

    def _show(self, number: int, image: Image) -> None:
        if self._unread.acquire(blocking=False):
            self._send(frames.preview(number, self._steps_done[number], len(self._first.table), image))

    def _finish(self, number: int, done: Future[Image]) -> None:
        if done.cancelled():
            return
        try:
            self._send(self._finished(number, done.result()))
        except Exception as error:  # noqa: BLE001 - it is told to the client, in a frame
            self._send(error)

    def _finished(self, number: int, image: Image) -> bytes:
        request, place = self.pictures[number].request, self._pixels
        pixels = image.tobytes()
        if place is not None:
            size = place.byte_size // len(self.pictures)
            replace(place, offset=place.offset + number * size, byte_size=size).write(pixels)
        sent = pixels if place is None else None
        return frames.image(number, request.seeds[0], image.size, image.info["parameters"], sent)

    def _send(self, made: bytes | Exception) -> None:
        self._loop.call_soon_threadsafe(self._made.put_nowait, made)

    async def frames(self, waiting: int) -> AsyncGenerator[bytes]:
        """Give the frames of the answer as they come about.

        Parameters
        ----------
        waiting
            Pictures that waited before these.

        """
        first, missing = self._first, len(self.pictures)
        try:
            yield frames.accepted(missing, len(first.table), first.width, first.height, waiting)
            while missing:
                try:
                    # Not wait_for: before Python 3.12 that forgets being cancelled when a frame comes as well.
                    async with asyncio.timeout(_PATIENCE_S):
                        made = await self._made.get()
                except TimeoutError:
                    yield frames.at_work()
                    continue
                if isinstance(made, Exception):
                    yield frames.error(told(made))
                    return
                yield made
                kind = frames.kind_of(made)
                missing -= kind is frames.Kind.IMAGE
                if kind is frames.Kind.PREVIEW:
                    self._unread.release()
            yield frames.done(self._settings())
        finally:
            for picture in self.pictures:
                picture.done.cancel()
            self._pixels = None  # pictures and what they call refer to each other, and so would keep it open

    def _settings(self) -> dict[str, Any]:
        first = self._first
        return {
            "model": self._model.name,
            "sampler": first.sampler,
            "num_inference_steps": first.table.num_inference_steps,
            "guidance_scale": first.guidance_scale,
            "width": first.width,
            "height": first.height,
            "seeds": [picture.request.seeds[0] for picture in self.pictures],
            "tokens": self._tokens,
            "seconds": round(time.perf_counter() - self._began, 6),
            "phases": [
                {phase: round(seconds, 6) for phase, seconds in picture.seconds.items()} for picture in self.pictures
            ],
        }


def _pixels(service: Service, fields: dict[str, Any], count: int, first: PictureRequest) -> View | None:
    """Find the memory that pictures are to be written into, if there is any."""
    if (given := fields.get("pixels")) is None:
        return None
    needed = count * first.width * first.height * _CHANNELS
    if given["byte_size"] < needed:
        message = f"pixels.byte_size is {given['byte_size']}: expected at least {needed}"
        raise RefusalError(400, message, param="pixels.byte_size")
    return replace(_memory(service, given, "pixels"), byte_size=needed)


def _latents(service: Service, model: Model, fields: dict[str, Any], count: int) -> NDArray[np.float32] | None:
    """Read what pictures are to start from, if it is given."""
    if (given := fields.get("latents")) is None:
        return None
    if not {"width", "height"} <= fields.keys():
        raise RefusalError(400, "latents are given without width and height: give both", param="latents")
    width, height = fields["width"], fields["height"]
    service.check_size(model, width, height)
    shape = (count, 4, height // 8, width // 8)
    needed = 4 * int(np.prod(shape))
    if given["byte_size"] != needed:
        message = f"latents.byte_size is {given['byte_size']}: expected {needed}, float32 of shape {shape}"
        raise RefusalError(400, message, param="latents.byte_size")
    content = _memory(service, given, "latents").read()
    return np.frombuffer(content, "<f4").reshape(shape).astype(np.float32)


def _memory(service: Service, given: dict[str, Any], name: str) -> View:
    try:
        return service.regions.borrow(given["key"], given.get("offset") or 0, given["byte_size"])
    except SharedMemoryOffError:
        raise
    except RegionError as error:
        raise RefusalError(400, str(error), param=name) from None
