"""The native protocol as a client that knows nothing but embed/PROTOCOL.md reads it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import struct
import time
from multiprocessing import shared_memory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from sdrt.runtime.images import to_pil
from sdrt.serve import native
from sdrt.serve.native_frames import Kind, kind_of
from sdrt.serve.service import Service

from .server import PATIENCE_S, serving, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import sdrt

    from .server import Server

GENERATE = "/native/v1/generate"
PROMPT = "a large red star on a blue background"
QUICK = {"prompt": PROMPT, "num_inference_steps": 4, "seed": 42}
ACCEPTED, STEP, PREVIEW, IMAGE, DONE, ERROR = range(1, 7)
SIZE = 128 * 128 * 3
SMALL = {"width": 64, "height": 64}


class Frame(NamedTuple):
    kind: int
    image: int
    payload: bytes


def frames(body: bytes) -> list[Frame]:
    """Take a body apart."""
    found = []
    while body:
        length, kind, image = struct.unpack_from("<IHH", body)
        found.append(Frame(kind, image, body[8 : 8 + length]))
        assert len(found[-1].payload) == length
        body = body[8 + length :]
    return found


@contextlib.contextmanager
def asking(server: Server, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE_S)
    connection.request("POST", GENERATE, json.dumps(body), {"Content-Type": "application/json"})
    try:
        yield connection.getresponse()
    finally:
        connection.close()


def generate(server: Server, **body: Any) -> list[Frame]:
    with asking(server, {**QUICK, **body}) as answer:
        content = answer.read()
        assert answer.status == 200, content
        assert answer.headers["content-type"] == "application/vnd.sdrt.frames"
        return frames(content)


def refused(server: Server, **body: Any) -> tuple[int, str | None, str]:
    with asking(server, {**QUICK, **body}) as answer:
        error = json.load(answer)["error"]
        return answer.status, error["param"], error["message"]


class Picture(NamedTuple):
    seed: int
    size: tuple[int, int]
    flags: int
    text: str
    pixels: bytes


def picture(frame: Frame) -> Picture:
    seed, width, height, flags, length = struct.unpack_from("<QIIII", frame.payload)
    text, pixels = frame.payload[24 : 24 + length], frame.payload[24 + length :]
    return Picture(seed, (width, height), flags, text.decode(), pixels)


def drawn(pipe: sdrt.Pipeline, **arguments: Any) -> tuple[bytes, str]:
    """Pixels and text of the picture that the pipeline makes in this process."""
    (image,) = pipe(**{"num_inference_steps": 4, "seed": 42, "prompt": PROMPT, **arguments})
    return image.tobytes(), image.info["parameters"]


@pytest.fixture(scope="module")
def sharing(home: Path) -> Iterator[Server]:
    with serving(home, "--allow-shared-memory") as running:
        yield running.wait_until_ready()


@pytest.fixture
def memory() -> Iterator[shared_memory.SharedMemory]:
    made = shared_memory.SharedMemory(create=True, size=4 * SIZE)
    yield made
    made.close()
    made.unlink()


def content_of(memory: shared_memory.SharedMemory) -> memoryview:
    assert memory.buf is not None, "it is open"
    return memory.buf


def test_frames_come_in_order(server: Server, pipe: sdrt.Pipeline) -> None:
    accepted, *steps, image, done = generate(server, sampler="euler", num_inference_steps=5)
    assert (accepted.kind, struct.unpack("<IIIII", accepted.payload)) == (ACCEPTED, (1, 5, 128, 128, 0))
    assert [frame.kind for frame in steps] == [STEP] * 5
    told = [struct.unpack("<IIdd", frame.payload) for frame in steps]
    assert [(number, total) for number, total, _, _ in told] == [(number, 5) for number in range(1, 6)]
    expected = list(pipe.steps(PROMPT, sampler="euler", num_inference_steps=5, seed=42))
    assert [timestep for _, _, timestep, _ in told] == [step.timestep for step in expected]
    assert all(0 < seconds < PATIENCE_S for *_, seconds in told)
    assert image.kind == IMAGE
    pixels, text = drawn(pipe, sampler="euler", num_inference_steps=5)
    assert picture(image) == (42, (128, 128), 0, text, pixels)
    settings = json.loads(done.payload)
    assert done.kind == DONE
    total, (phases,) = settings.pop("seconds"), settings.pop("phases")
    assert set(phases) == {"queue", "prepare", "denoise", "decode"}
    assert 0 < sum(phases.values()) < total + 1e-3
    assert settings == {
        "model": "demo",
        "sampler": "euler",
        "num_inference_steps": 5,
        "guidance_scale": 7.5,
        "width": 128,
        "height": 128,
        "seeds": [42],
        "tokens": {"prompt": 8},
    }


def test_previews_are_real_pictures(server: Server, pipe: sdrt.Pipeline) -> None:
    found = generate(server, sampler="ddim", num_inference_steps=8, preview_interval=3)
    assert [frame.kind for frame in found if frame.kind != STEP] == [ACCEPTED, PREVIEW, PREVIEW, IMAGE, DONE]
    steps = list(pipe.steps(PROMPT, sampler="ddim", num_inference_steps=8, seed=42))
    for number, frame in zip((3, 6), [frame for frame in found if frame.kind == PREVIEW], strict=True):
        assert struct.unpack_from("<IIII", frame.payload) == (number, 8, 128, 128)
        (pixels,) = pipe.decode(steps[number - 1].estimate)
        assert frame.payload[16:] == to_pil(pixels, "").tobytes()


def test_several_pictures(server: Server, pipe: sdrt.Pipeline) -> None:
    found = generate(server, n=3)
    images = {frame.image: picture(frame) for frame in found if frame.kind == IMAGE}
    assert {number: (each.seed, each.pixels) for number, each in images.items()} == {
        number: (42 + number, drawn(pipe, seed=42 + number)[0]) for number in range(3)
    }
    for number in range(3):
        kinds = [frame.kind for frame in found[1:-1] if frame.image == number]
        assert kinds == [STEP] * (len(kinds) - 1) + [IMAGE]


def test_pixels_through_shared_memory(sharing: Server, pipe: sdrt.Pipeline, memory: shared_memory.SharedMemory) -> None:
    place = {"key": memory.name, "offset": 100, "byte_size": 3 * SIZE}
    images = [picture(frame) for frame in generate(sharing, n=2, pixels=place) if frame.kind == IMAGE]
    assert {(each.seed, each.flags, each.pixels) for each in images} == {(42, 1, b""), (43, 1, b"")}
    expected = b"".join(drawn(pipe, seed=seed)[0] for seed in (42, 43))
    assert content_of(memory)[: 100 + 2 * SIZE + 1].tobytes() == bytes(100) + expected + bytes(1)


def test_latents_through_shared_memory(
    sharing: Server, pipe: sdrt.Pipeline, memory: shared_memory.SharedMemory
) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 16)).astype("<f4")
    content_of(memory)[64 : 64 + latents.nbytes] = latents.tobytes()
    place = {"key": f"/{memory.name}", "offset": 64, "byte_size": latents.nbytes}
    found = generate(sharing, n=2, latents=place, width=128, height=64)
    for frame in found:
        if frame.kind == IMAGE:
            expected = drawn(pipe, latents=latents[frame.image : frame.image + 1], width=128, height=64)
            assert picture(frame).pixels == expected[0]
    broken = {**place, "offset": 0}
    content_of(memory)[:64] = b"\xff" * 64
    status, _, message = refused(sharing, n=2, latents=broken, width=128, height=64)
    assert (status, message) == (400, "latents hold values that are not finite: expected a unit gaussian")


def test_an_error_is_a_frame(sharing: Server, memory: shared_memory.SharedMemory) -> None:
    """Memory that is cut short while the picture is made."""
    with asking(sharing, {**QUICK, "pixels": {"key": memory.name, "byte_size": SIZE}, "sampler": "ddim"}) as answer:
        assert answer.status == 200
        os.truncate(f"/dev/shm/{memory.name}", 100)
        *_, last = frames(answer.read())
    assert last.kind == ERROR
    assert struct.unpack_from("<I", last.payload) == (400,)
    assert "was cut short" in json.loads(last.payload[4:])["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"seed": -1}, 400, "seed", "expected a whole number from 0 to"),
        ({"size": "64x64"}, 400, "size", 'unknown field "size"'),
        ({"model": "dall-e-3"}, 404, "model", "expected one of demo"),
        ({"width": 100}, 400, None, "width is 100: expected a multiple of 8"),
        ({"width": 1024, "height": 1024}, 400, None, "size is 1024x1024: expected at most 256x256"),
        ({"prompt": "\ud800"}, 400, None, "half a surrogate pair"),
        ({"n": 11}, 400, "n", "from 1 to 10"),
        ({"preview_interval": 0}, 400, "preview_interval", "from 1 to 1000"),
        ({"pixels": {"key": "/x"}}, 400, "pixels.byte_size", "pixels.byte_size is missing"),
        ({"pixels": {"key": "/x", "byte_size": 1, "path": "/etc"}}, 400, "pixels.path", "unknown field"),
        ({"pixels": {"key": "/no-such", "byte_size": SIZE}}, 400, "pixels", "cannot be opened"),
        ({"pixels": {"key": "/../../etc/passwd", "byte_size": SIZE}}, 400, "pixels", "expected the name of"),
        ({**SMALL, "latents": {"key": "/no-such", "byte_size": 1024}}, 400, "latents", "cannot be opened"),
    ],
)
def test_what_is_refused(sharing: Server, body: dict[str, Any], status: int, param: str | None, message: str) -> None:
    found = refused(sharing, **body)
    assert found[:2] == (status, param)
    assert message in found[2]


def test_memory_that_is_too_small(sharing: Server, memory: shared_memory.SharedMemory) -> None:
    name = memory.name
    found = refused(sharing, pixels={"key": name, "byte_size": SIZE - 1})
    assert found == (400, "pixels.byte_size", f"pixels.byte_size is {SIZE - 1}: expected at least {SIZE}")
    status, param, message = refused(sharing, latents={"key": name, "byte_size": 64})
    assert (status, param, message) == (400, "latents", "latents are given without width and height: give both")
    found = refused(sharing, latents={"key": name, "byte_size": 64}, **SMALL)
    expected = "latents.byte_size is 64: expected 1024, float32 of shape (1, 4, 8, 8)"
    assert found == (400, "latents.byte_size", expected)
    found = refused(sharing, latents={"key": name, "byte_size": 64}, width=8192, height=8192)
    assert "expected at most 256x256" in found[2]


def test_memory_is_not_shared_unless_allowed(server: Server, memory: shared_memory.SharedMemory) -> None:
    status, _, message = refused(server, pixels={"key": memory.name, "byte_size": SIZE})
    assert (status, message) == (403, "memory is not shared: start sdrt serve with --allow-shared-memory")


def test_descriptors_are_let_go_of(sharing: Server, memory: shared_memory.SharedMemory) -> None:
    place = {"key": memory.name, "byte_size": SIZE}
    generate(sharing, num_inference_steps=1, sampler="ddim", pixels=place)
    before = sharing.figure("process_open_fds")
    for _ in range(3):
        generate(sharing, num_inference_steps=1, sampler="ddim", pixels=place)
        refused(sharing, pixels={**place, "byte_size": 1})
    until("they are closed", lambda: sharing.figure("process_open_fds") <= before)


def test_work_stops_within_a_step_of_its_client(server: Server) -> None:
    before = server.figure("sdrt_steps_total")
    with asking(server, {"prompt": PROMPT, "num_inference_steps": 1000, "sampler": "ddpm", "n": 2}) as answer:
        until("it runs", lambda: len(answer.read(256)) == 256)
    until("it has stopped", lambda: server.figure("sdrt_running_images") == 0)
    steps = server.figure("sdrt_steps_total")
    assert steps < before + 1000
    time.sleep(0.2)
    assert server.figure("sdrt_steps_total") == steps


def test_a_full_queue(home: Path) -> None:
    endless = {"prompt": PROMPT, "num_inference_steps": 1000, "sampler": "ddpm"}
    with serving(home, "--at-once", "1", "--queue", "1") as narrow:
        with asking(narrow.wait_until_ready(), endless) as made:
            made.read(64)
            with asking(narrow, endless) as waiting:
                waiting.read(20)
                with asking(narrow, QUICK) as late:
                    error = json.load(late)["error"]
                    assert (late.status, error["code"]) == (429, "queue_full")
                    assert int(late.headers["retry-after"]) > 0
        until("there is room", lambda: narrow.figure("sdrt_running_images") == 0)
        assert generate(narrow)[-1].kind == DONE


async def stream(pipe: sdrt.Pipeline, *, read_late: bool, **fields: Any) -> list[Kind]:
    """The kinds of all frames of one picture, made as on a GPU: by a model whose calls wait for no others."""
    service = Service([pipe], asyncio.get_running_loop(), most_at_once=1, places=1, largest=None)
    order = native.Order(service, service.model(None), {"prompt": "a star", "sampler": "ddim", **fields}, 1)
    service.scheduler.submit(order.pictures)
    if read_late:
        await asyncio.to_thread(order.pictures[0].done.result)
    found = [kind_of(frame) async for frame in order.frames(0)]
    await asyncio.to_thread(service.scheduler.drain)
    return found


def test_slow_readers_miss_previews(pipe: sdrt.Pipeline) -> None:
    """More than a few are not kept for them; the picture is."""
    found = asyncio.run(stream(pipe, read_late=True, num_inference_steps=12, preview_interval=1))
    assert found.count(Kind.PREVIEW) == 4
    assert found.count(Kind.STEP) == 12
    assert found[-2:] == [Kind.IMAGE, Kind.DONE]


def test_a_client_hears_of_a_server_that_is_at_work(pipe: sdrt.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PATIENCE_S", 0.01)
    assert Kind.AT_WORK in asyncio.run(stream(pipe, read_late=False, num_inference_steps=2))
