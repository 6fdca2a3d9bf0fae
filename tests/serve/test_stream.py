"""What a stream says while there is nothing to show, and when something goes wrong after it has begun."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import sdrt
from sdrt.engines import demo
from sdrt.serve import images_api, native
from sdrt.serve.service import Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


async def stream(pipe: sdrt.Pipeline) -> list[str]:
    """All events of one picture, made as on a GPU: by a model whose calls do not wait for those of others."""
    service = Service([pipe], asyncio.get_running_loop(), most_at_once=1, places=1, largest=None)
    order = images_api.Order(service, service.model(None), {"prompt": "a star", "num_inference_steps": 20}, 1)
    service.scheduler.submit(order.pictures)
    events = [event async for event in order.events()]
    await asyncio.to_thread(service.scheduler.drain)
    return events


def test_it_is_never_silent_for_long(pipe: sdrt.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_api, "_PATIENCE_S", 0.02)
    *waiting, last = asyncio.run(stream(pipe))
    assert set(waiting) == {": at work\n\n"}
    assert last.startswith("event: image_generation.completed\ndata: {")


def test_an_error_is_an_event(home: Path) -> None:
    closed = sdrt.load(demo.bundle_folder(home), backend="onnxruntime")
    closed.close()
    (event,) = asyncio.run(stream(closed))
    name, _, data = event.partition("\ndata: ")
    assert name == "event: error"
    content = json.loads(data)
    assert content["type"] == "error"
    assert "this pipeline is closed" in content["error"]["message"]


async def leave(pipe: sdrt.Pipeline, kind: type[images_api.Order | native.Order], turns: int) -> tuple[bool, bool]:
    """Go away so many turns of the event loop after something was sent, and tell what that ended."""
    loop = asyncio.get_running_loop()
    service = Service([pipe], loop, most_at_once=1, places=1, largest=None)
    fields = {"prompt": "a star", "sampler": "ddim", "num_inference_steps": 100, "partial_images": 3}
    order = kind(service, service.model(None), fields, 1)
    (picture,) = order.pictures

    def leave_in(left: int) -> None:
        loop.call_soon(leave_in, left - 1) if left else reader.cancel()

    def then_leave(send: Callable[[Any], None], made: Any) -> None:
        def both() -> None:
            send(made)
            leave_in(turns)

        loop.call_soon_threadsafe(both)

    async def read(parts: AsyncIterator[str | bytes]) -> None:
        async for _ in parts:
            pass

    if isinstance(order, native.Order):
        picture.stepped = partial(then_leave, picture.stepped)
        reader = asyncio.ensure_future(read(order.frames(0)))
    else:
        picture.show = partial(then_leave, picture.show)
        reader = asyncio.ensure_future(read(order.events()))
    service.scheduler.submit(order.pictures)
    await asyncio.wait({reader})
    await asyncio.to_thread(service.scheduler.drain)
    return reader.cancelled(), picture.done.cancelled()


@pytest.mark.parametrize("kind", [images_api.Order, native.Order], ids=["images", "native"])
@pytest.mark.parametrize("turns", range(6))
def test_work_stops_whenever_its_client_leaves(
    pipe: sdrt.Pipeline, kind: type[images_api.Order | native.Order], turns: int
) -> None:
    """Be it while something is on its way to it."""
    assert asyncio.run(leave(pipe, kind, turns)) == (True, True)
