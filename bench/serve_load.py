"""A server with more to do than it can, and with one or several pictures in a batch."""

from __future__ import annotations

import base64
import http.client
import statistics
import time
from collections import Counter
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import psutil
from tests.serve.server import Server, serving

import sdrt
from bench.serve_clients import Crowd, Order, crowd_beside, spread
from sdrt.engines import demo
from sdrt.runtime.images import encode
from sdrt.runtime.onnx import OnnxSession

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from bench.serve_clients import Load

STEPS: Final = 20
AT_ONCE: Final = 4
CLIENTS: Final = 2 * AT_ONCE
"""Of a closed loop: for as many pictures as are made at once, and as many that wait."""
CLOSED_S: Final = 20.0
PROBE_EVERY_S: Final = 0.05
WARM_UP_S: Final = 20.0
REFUSALS: Final = (429, 503)
ROWS: Final = (1, 2, 4, 8, 16)
_SUBJECTS = ("a red star", "a green ring on white", "a small yellow circle at the top on purple", "a blue square")


def orders(home: Path, number: int, **settings: Any) -> list[Order]:
    """Make pictures in this process, and the requests that a server must answer with them, every fourth a stream's."""
    found = []
    with sdrt.load(demo.bundle_folder(home), backend="onnxruntime") as pipe:
        for seed in range(number):
            prompt = _SUBJECTS[seed % len(_SUBJECTS)]
            (image,) = pipe(prompt, seed=seed, **settings)
            body = {"prompt": prompt, "seed": seed, "stream": seed % 4 == 3, **settings}
            found.append(Order(body, base64.b64encode(encode(image)).decode()))
    return found


def overload(home: Path, *, seconds: float, factor: float) -> dict[str, Any]:
    """Measure what a server can do, and then ask so many times as much of it.

    Parameters
    ----------
    home
        Where the demo is unpacked.
    seconds
        How long it is asked too much.
    factor
        How much too much.

    """
    asked = orders(home, 32, num_inference_steps=STEPS)
    with serving(home, "--at-once", str(AT_ONCE)) as server:
        server.wait_until_ready()
        with crowd_beside(server.url, asked, partial(Crowd.closed, clients=CLIENTS, seconds=CLOSED_S)) as closed:
            capacity = pictures_per_second(closed.result())
        process = psutil.Process(server.process.pid)
        before = process.cpu_times()
        many = partial(Crowd.open, rate=factor * capacity, seconds=seconds, seed=0)
        with crowd_beside(server.url, asked, many) as load:
            health, memory = _watch(server, process, load, seconds)
            asking = load.result()
        after = process.cpu_times()
    made = [each for each in asking.answers if each.status == http.HTTPStatus.OK]
    refused = [each for each in asking.answers if each.status in REFUSALS]
    first, last = min(each.due for each in asking.answers), max(each.ended for each in asking.answers)
    return {
        "steps": STEPS,
        "capacity, pictures per second": round(capacity, 2),
        "asked, pictures per second": round(len(asking.answers) / seconds, 2),
        "seconds": seconds,
        "requests by status": dict(Counter(str(each.status) for each in asking.answers)),
        "accepted and lost": len(asking.answers) - len(made) - len(refused),
        "accepted and not the exact picture": sum(not each.exact for each in made),
        "made, pictures per second": round(len(made) / (last - first), 2),
        "ms to a picture": spread([each.seconds for each in made]),
        "ms to a refusal": spread([each.seconds for each in refused]),
        "ms to /healthz": spread(health),
        "probes of /healthz": len(health),
        "memory": _flatness(memory),
        "CPU seconds": {
            "server": round(after.user + after.system - before.user - before.system, 1),
            "clients": round(asking.cpu_seconds, 1),
        },
    }


def pictures_per_second(load: Load) -> float:
    """Count what was made from the first request to the last answer."""
    wrong = [each for each in load.answers if not each.exact]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(load.answers)} answers are not the expected pictures: {wrong[0]}")
    return len(load.answers) / (max(each.ended for each in load.answers) - min(each.due for each in load.answers))


def _watch(
    server: Server, process: psutil.Process, load: Future[Load], seconds: float
) -> tuple[list[float], list[tuple[float, float]]]:
    """Ask for /healthz, each time over a new connection, and read the resident memory, while a load is on.

    Returns
    -------
    tuple
        Seconds of each probe; and of the memory the seconds since the beginning and the megabytes.

    """
    health: list[float] = []
    memory: list[tuple[float, float]] = []
    began = time.monotonic()
    for number in count():
        due = began + number * PROBE_EVERY_S
        if load.done() or due > began + seconds:
            return health, memory
        time.sleep(max(0.0, due - time.monotonic()))
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        connection.request("GET", "/healthz", headers={"Connection": "close"})
        answer = connection.getresponse()
        answer.read()
        health.append(time.monotonic() - due)
        connection.close()
        if answer.status != http.HTTPStatus.OK:
            raise RuntimeError(f"/healthz says {answer.status}")
        if number % int(1 / PROBE_EVERY_S) == 0:
            memory.append((due - began, process.memory_info().rss / 1e6))
    raise AssertionError


def _flatness(memory: list[tuple[float, float]]) -> dict[str, Any]:
    """Sum up resident memory over time: its values, and how it grew after the first seconds."""
    warm = [point for point in memory if point[0] >= min(WARM_UP_S, memory[-1][0] / 2)]
    slope = statistics.linear_regression(*zip(*warm, strict=True)).slope if len(warm) > 1 else 0.0
    return {
        "MB, every tenth second": [round(megabytes) for _, megabytes in memory[::10]],
        "MB after warm-up, least and most": [round(pick(mb for _, mb in warm), 1) for pick in (min, max)],
        "growth after warm-up, MB per minute": round(60 * slope, 2),
    }


def batching(home: Path, *, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure the pictures per second one by one and in batches, in turn, and what a row of the U-Net costs in each.

    Parameters
    ----------
    home
        Where the demo is unpacked.
    seconds
        Of each load.
    rounds
        How many of each kind.

    """
    found: dict[str, Any] = {}
    for name, settings in {"guided": {}, "unguided": {"guidance_scale": 1.0}}.items():
        asked = orders(home, 16, num_inference_steps=STEPS, **settings)
        rates: dict[int, list[float]] = {1: [], AT_ONCE: []}
        batches: dict[int, float] = {}
        for at_once in [*rates] * rounds:
            with serving(home, "--at-once", str(at_once)) as server:
                server.wait_until_ready()
                everyone = partial(Crowd.closed, clients=CLIENTS, seconds=seconds)
                with crowd_beside(server.url, asked, everyone) as load:
                    rates[at_once].append(round(pictures_per_second(load.result()), 2))
                calls = server.figure("sdrt_batch_images_count")
                batches[at_once] = round(server.figure("sdrt_batch_images_sum") / calls, 2)
        alone, together = (statistics.median(each) for each in rates.values())
        found[name] = {
            "pictures per second": {f"--at-once {at_once}": each for at_once, each in rates.items()},
            "pictures in a call of the U-Net, mean": batches[AT_ONCE],
            "batched over unbatched": round(together / alone, 3),
        }
    return {"steps": STEPS, "clients": CLIENTS, **found, "U-Net, ms a row by rows of the batch": row_costs(home)}


def row_costs(home: Path, rounds: int = 20) -> dict[str, float]:
    """Time calls of the U-Net by the rows of their batch, in turn, in milliseconds a row; a guided picture is two."""
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    with sdrt.load(demo.bundle_folder(home), backend="onnxruntime") as pipe:
        component, manifest = pipe.bundle.component("unet"), pipe.bundle.manifest
        width, side = manifest.text.embedding_width, manifest.latent.sample_size
        with OnnxSession(pipe.bundle.path(pipe.bundle.merged_graph(component)), component) as session:
            bindings = {}
            for rows in ROWS:
                latents = (rows, 4, side, side)
                shapes = {"latents": latents, "timestep": (1,), "text_embeddings": (rows, 77, width)}
                bindings[rows] = session.bind({**shapes, "prediction": latents})
                for array in bindings[rows].inputs.values():
                    array[...] = np.random.default_rng(0).standard_normal(array.shape)
            for _ in range(rounds + 1):
                for rows, binding in bindings.items():
                    began = time.perf_counter()
                    binding.run()
                    times[rows].append(time.perf_counter() - began)
    return {str(rows): round(1000 * statistics.median(each[1:]) / rows, 2) for rows, each in times.items()}
