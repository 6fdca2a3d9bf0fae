"""OpenAI's Images API: `POST /v1/images/generations`.

Its reference is https://platform.openai.com/docs/api-reference/images; answers are what OpenAI's Python client reads.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..runtime.images import encode
from .fields import COUNT, MODEL, PROMPT, SETTINGS, choice, make_requests, optional
from .http import JSONAnswer, RefusalError, Stream, read_object, told, until_gone
from .openapi import Operation
from .scheduler import Picture

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from PIL.Image import Image
    from starlette.requests import Request
    from starlette.responses import Response

    from .models import Model
    from .schema import Schema
    from .service import Service

MOST_PARTIAL = 3
_PATIENCE_S = 15.0
"""Between two lines of a stream: what stands between client and server may take a longer silence for the end."""
_SIZE = re.compile(r"([0-9]{1,4})x([0-9]{1,4})")
_FORMATS = ("png", "jpeg", "webp")

_REFUSED = {
    "style": "say it in the prompt",
    "moderation": "nothing here looks at what pictures show",
    "complexity": "num_inference_steps says how much work a picture is",
    "frame_count": "there are no animations",
    "frame_duration_ms": "there are no animations",
    "svg": "pictures are made of pixels",
}
"""Fields of OpenAI's that make no sense here, and why."""


GENERATION: Schema = {
    "type": "object",
    "required": ["prompt"],
    "additionalProperties": False,
    "properties": {
        "prompt": PROMPT,
        "model": MODEL,
        "n": COUNT,
        "size": optional(
            "string",
            "Width and height in pixels, multiples of 8; auto, the default, is what the model was trained on.",
            pattern=r"^(auto|[0-9]{1,4}x[0-9]{1,4})$",
            examples=["512x512"],
        ),
        "response_format": choice("Pictures come in the answer itself.", "b64_json"),
        "output_format": choice("png, the default, carries the settings as text, as A1111 writes them.", *_FORMATS),
        "output_compression": optional("integer", "Quality of jpeg and webp, 100 by default.", minimum=0, maximum=100),
        "quality": choice("num_inference_steps sets it.", "auto"),
        "background": choice("Pictures have no transparent parts.", "auto", "opaque"),
        "stream": optional("boolean", "Answer with server-sent events."),
        "partial_images": optional(
            "integer", "Pictures to show on the way, in a stream.", minimum=0, maximum=MOST_PARTIAL
        ),
        "user": optional("string", "Not used.", maxLength=512),
        "safety_identifier": optional("string", "Not used.", maxLength=512),
        **SETTINGS,
    },
}

_TEXT = {"type": "string"}
_NUMBER = {"type": "integer"}
USAGE: Schema = {
    "type": "object",
    "required": ["input_tokens", "input_tokens_details", "output_tokens", "total_tokens"],
    "properties": {
        "input_tokens": _NUMBER,
        "input_tokens_details": {"type": "object", "properties": {"text_tokens": _NUMBER, "image_tokens": _NUMBER}},
        "output_tokens": _NUMBER,
        "total_tokens": _NUMBER,
    },
}
IMAGES: Schema = {
    "type": "object",
    "required": ["created", "data", "size", "output_format", "background", "usage"],
    "properties": {
        "created": {**_NUMBER, "description": "Seconds since 1970."},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["b64_json", "seed"],
                "properties": {"b64_json": _TEXT, "seed": {**_NUMBER, "description": "Makes the same picture again."}},
            },
        },
        "size": _TEXT,
        "output_format": {"type": "string", "enum": list(_FORMATS)},
        "background": {"type": "string", "enum": ["opaque"]},
        "usage": USAGE,
    },
}
EVENT: Schema = {
    "type": "object",
    "description": "One event; before OpenAPI 3.2 the schema of a stream is that of each.",
    "required": ["event", "data"],
    "properties": {
        "event": {
            "type": "string",
            "enum": ["image_generation.partial_image", "image_generation.completed", "error"],
        },
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "description": "One line: type, b64_json, created_at, size, output_format, background and quality; with a "
            "partial picture partial_image_index, from 0; with the finished one seed and usage; of an error type and "
            "error alone.",
        },
    },
}


def operation(service: Service) -> Operation:
    """Offer it."""

    async def generate(request: Request) -> Response:
        return await _generate(service, request)

    return Operation(
        "POST",
        "/v1/images/generations",
        "createImage",
        "Make pictures.",
        generate,
        {200: ("The pictures.", {"application/json": IMAGES, "text/event-stream": EVENT})},
        body=GENERATION,
        errors=(400, 404, 408, 413, 415, 429, 503),
    )


async def _generate(service: Service, request: Request) -> Response:
    given = await read_object(request, GENERATION, _REFUSED)
    fields = {name: value for name, value in given.items() if value is not None}
    streaming = fields.get("stream", False)
    count = fields.get("n", 1)
    if streaming and count > 1:
        raise RefusalError(400, f"n is {count}: expected 1 with stream, whose events do not number pictures", param="n")
    if fields.get("partial_images") and not streaming:
        message = "partial_images is given without stream: expected stream to be true, or no partial_images"
        raise RefusalError(400, message, param="partial_images")
    if fields.get("output_format", "png") == "png" and fields.get("output_compression", 100) != 100:
        message = "output_compression is for jpeg and webp: expected 100 for png, which loses nothing"
        raise RefusalError(400, message, param="output_compression")
    service.check_ready()
    model = service.model(fields.get("model"))
    service.scheduler.check_room(count)
    # Tables of a thousand steps take milliseconds that others need not wait for.
    order = await asyncio.to_thread(Order, service, model, fields, count)
    service.scheduler.submit(order.pictures)
    if streaming:
        return Stream(order.events(), "text/event-stream")
    return JSONAnswer(await until_gone(request.receive, order.answer()))


class Order:
    """What one request asked for, from its fields to its answer.

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
        The fields make no sense for this model.

    """

    def __init__(self, service: Service, model: Model, fields: dict[str, Any], count: int) -> None:
        self._service = service
        self._model = model
        self._format: str = fields.get("output_format", "png")
        self._quality: int = fields.get("output_compression", 100)
        self._tokens = sum(
            model.pipeline.tokenizer.count(fields.get(name, "")) for name in ("prompt", "negative_prompt")
        )
        self._count = count
        if (size := fields.get("size", "auto")) != "auto":
            fields["width"], fields["height"] = _size(service, model, size)
        requests = make_requests(model, fields, count)
        first = requests[0]
        previews = frozenset(_evenly(fields.get("partial_images", 0), len(first.table)))
        self._shown: asyncio.Queue[Image | None] = asyncio.Queue()
        self._loop = service.loop
        self._size = f"{first.width}x{first.height}"
        self.pictures = [Picture(model, request, previews, self._show) for request in requests]

    def _show(self, image: Image) -> None:
        self._loop.call_soon_threadsafe(self._shown.put_nowait, image)

    async def answer(self) -> dict[str, Any]:
        """Wait for the pictures and give the body of the answer."""
        try:
            # Each while others are still made: a server that ends does not wait long once all are.
            texts = await asyncio.gather(*map(self._file, self.pictures))
        finally:
            self._give_up()
        return {
            "created": int(time.time()),
            "data": [
                {"b64_json": text, "seed": picture.request.seeds[0]}
                for text, picture in zip(texts, self.pictures, strict=True)
            ],
            **self._facts(),
            "usage": self._usage(),
        }

    async def events(self) -> AsyncGenerator[str]:
        """Give the events of the answer as they come about."""
        try:
            (picture,) = self.pictures
            done = asyncio.wrap_future(picture.done)
            done.add_done_callback(lambda _: self._shown.put_nowait(None))
            index = 0
            while True:
                try:
                    # Not wait_for: before Python 3.12 that forgets being cancelled when a picture comes as well.
                    async with asyncio.timeout(_PATIENCE_S):
                        image = await self._shown.get()
                except TimeoutError:
                    yield ": at work\n\n"
                    continue
                if image is None:
                    break
                yield await self._event("partial_image", image, {"partial_image_index": index})
                index += 1
            more = {"seed": picture.request.seeds[0], "usage": self._usage()}
            yield await self._event("completed", await done, more)
        except Exception as error:  # noqa: BLE001 - the status is sent already: an event is what is left
            yield f"event: error\ndata: {json.dumps({'type': 'error', **told(error).content()})}\n\n"
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Stop what is not done yet."""
        for picture in self.pictures:
            picture.done.cancel()

    async def _event(self, what: str, image: Image, more: dict[str, Any]) -> str:
        name = f"image_generation.{what}"
        data = {
            "type": name,
            "b64_json": await self._encoded(image),
            "created_at": int(time.time()),
            "quality": "auto",
            **self._facts(),
            **more,
        }
        return f"event: {name}\ndata: {json.dumps(data)}\n\n"

    def _facts(self) -> dict[str, Any]:
        return {"size": self._size, "output_format": self._format, "background": "opaque"}

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self._tokens,
            "input_tokens_details": {"text_tokens": self._tokens, "image_tokens": 0},
            "output_tokens": 0,
            "total_tokens": self._tokens,
        }

    async def _file(self, picture: Picture) -> str:
        return await self._encoded(await asyncio.wrap_future(picture.done))

    async def _encoded(self, image: Image) -> str:
        began = time.perf_counter()
        content = await asyncio.to_thread(encode, image, self._format, self._quality)
        phases = self._service.metrics.phases
        phases.labels(self._model.name, "encode").observe(time.perf_counter() - began)
        return base64.b64encode(content).decode("ascii")


def _size(service: Service, model: Model, text: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise RefusalError(400, f"size is {text!r}: expected width and height, such as 512x512", param="size")
    width, height = int(match[1]), int(match[2])
    try:
        service.check_size(model, width, height)
    except InputError as error:
        raise RefusalError(400, str(error), param="size") from None
    return width, height


def _evenly(count: int, steps: int) -> Sequence[int]:
    """Choose the steps, from 0, after which pictures are shown; never the last, which gives the finished picture."""
    return [step for part in range(1, count + 1) if 0 <= (step := part * steps // (count + 1) - 1) < steps - 1]
