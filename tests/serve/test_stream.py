"""What a stream says while there is nothing to show, and when something goes wrong after it has begun."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import sdrt
from sdrt.engines import demo
from sdrt.serve import images_api
from sdrt.serve.service import Service

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


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
