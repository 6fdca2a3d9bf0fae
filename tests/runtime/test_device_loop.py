"""The GPU's loop against the host's, over STAND-INS for the driver and the engine; see `driver_stand_in`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.errors import BackendError, DeviceMemoryError, SdrtWarning
from sdrt.runtime.cuda import Device, Stream
from sdrt.runtime.device_array import DeviceArray
from sdrt.runtime.device_kernel import StepKernel
from sdrt.runtime.device_loop import DeviceLoop
from sdrt.runtime.device_steps import DeviceStep, Recording
from sdrt.runtime.loop import denoise
from sdrt.runtime.noise import batch_noise
from sdrt.runtime.samplers import SAMPLERS, sampler_table
from sdrt.runtime.schedule import Schedule

from .driver_stand_in import DriverStandIn, EngineStandIn, garbage_collected, network, nothing_left

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdrt.runtime.solvers import SamplerTable

SHAPE = (2, 4, 3, 5)
EMBEDDINGS = np.random.default_rng(0).normal(size=(4, 7, 6)).astype(np.float32)
SCALE = 5.5
HOST_COPIES = ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyDtoH")
WAITS = ("cuStreamSynchronize", "cuEventSynchronize")


class Bench:
    """A loop over stand-ins, with what it is made of."""

    def __init__(self, driver: DriverStandIn, stack: ExitStack, *, guided: bool, capturable: bool = True) -> None:
        self.driver = driver
        self.device = stack.enter_context(Device(0, driver))
        stack.enter_context(self.device.current())
        self.stream = stack.enter_context(Stream(self.device))
        kernel = StepKernel(self.device)
        stack.callback(kernel.close)
        rows = SHAPE[0] * (2 if guided else 1)
        self.embeddings = EMBEDDINGS[:rows]
        shapes = {"latents": (rows, *SHAPE[1:]), "timestep": (1,), "text_embeddings": self.embeddings.shape}

        def bind() -> EngineStandIn:
            self.engine = EngineStandIn(
                driver,
                self.stream.pointer,
                self.device,
                shapes | {"prediction": (rows, *SHAPE[1:])},
                capturable=capturable,
            )
            self.engine.array("text_embeddings")[...] = self.embeddings
            return self.engine

        self.loop = stack.enter_context(DeviceLoop(self.device, self.stream, kernel, bind, SHAPE, guided=guided))

    def run(self, table: SamplerTable, *, seeds: tuple[int, int] = (1, 2)) -> np.ndarray[Any, Any]:
        draw = batch_noise(seeds, SHAPE[1:])
        self.loop.begin(table, SCALE, draw(), draw)
        for _ in range(len(table)):
            self.loop.step()
        return self.fetch()

    def fetch(self) -> np.ndarray[Any, Any]:
        result = DeviceArray(self.device, SHAPE)
        self.stream.copy(result.pointer, self.loop.result, result.nbytes)
        return result.written_by(self.stream).numpy()


@pytest.fixture
def driver() -> Iterator[DriverStandIn]:
    stand_in = DriverStandIn()
    with nothing_left(stand_in):
        yield stand_in


@pytest.fixture
def make(driver: DriverStandIn) -> Iterator[Callable[..., Bench]]:
    with ExitStack() as stack:
        yield lambda **options: Bench(driver, stack, **options)


def on_host(table: SamplerTable, *, guided: bool, seeds: tuple[int, int] = (1, 2)) -> list[np.ndarray[Any, Any]]:
    def predict(x: Any, t: float) -> Any:
        if not guided:
            return network(x, t, EMBEDDINGS[:2])
        unconditional, conditional = network(x, t, EMBEDDINGS[:2]), network(x, t, EMBEDDINGS[2:])
        return (conditional - unconditional) * np.float32(SCALE) + unconditional

    draw = batch_noise(seeds, SHAPE[1:])
    return [step.latents for step in denoise(table, draw(), predict, draw)]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 21])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stand_in_loop_gives_the_hosts_latents(
    make: Callable[..., Bench], sampler: str, steps: int, *, guided: bool
) -> None:
    table = sampler_table(sampler, Schedule(), steps, eta=0.6 if sampler == "ddim" else 0.0)
    bench = make(guided=guided)
    expected = on_host(table, guided=guided)[-1]
    np.testing.assert_allclose(bench.run(table), expected, rtol=1e-6, atol=1e-6)


def test_stand_in_loop_serves_one_request_after_another_with_one_graph(make: Callable[..., Bench]) -> None:
    bench = make(guided=True)
    for sampler, steps, seeds in [
        ("euler_a", 4, (1, 2)),
        ("plms", 9, (3, 4)),
        ("ddpm", 30, (5, 6)),
        ("euler", 1, (7, 8)),
    ]:
        table = sampler_table(sampler, Schedule(), steps)
        found = bench.run(table, seeds=seeds)
        np.testing.assert_allclose(found, on_host(table, guided=True, seeds=seeds)[-1], rtol=1e-6, atol=1e-6)
    assert bench.driver.count("cuGraphInstantiate") == 1


def test_stand_in_nothing_is_copied_or_waited_for_between_first_and_last_step(make: Callable[..., Bench]) -> None:
    bench = make(guided=True)
    table = sampler_table("euler_a", Schedule(), 20)
    draw = batch_noise((1, 2), SHAPE[1:])
    bench.loop.begin(table, SCALE, draw(), draw)
    before = len(bench.driver.calls)
    for _ in range(len(table)):
        bench.loop.step()
    during = bench.driver.calls[before:]
    assert not {*HOST_COPIES, *WAITS, "cuMemcpyDtoDAsync", "cuMemAlloc", "cuMemFree"} & set(during)
    # The first step runs by itself, the second is captured, and all but the first are launched.
    assert during.count("cuGraphLaunch") == len(table) - 1
    assert during.count("cuLaunchKernel") == 2
    assert bench.engine.enqueued == 2
    order = [name for name in during if name != "cuLaunchKernel"][:4]
    assert order == ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphLaunch"]
    # One launch is all that a later step costs.
    assert set(during[-10:]) == {"cuGraphLaunch"}
    # Five copies make a request, however many steps: control, table with noise, and the latents among them.
    assert bench.driver.count("cuMemcpyHtoDAsync") == 3
    bench.fetch()  # which waits: a loop may be closed only when its stream is done


def test_stand_in_steps_are_seen_when_asked_for_and_stay(make: Callable[..., Bench]) -> None:
    bench = make(guided=True)
    table = sampler_table("plms", Schedule(), 6)
    draw = batch_noise((1, 2), SHAPE[1:])
    recording = Recording(bench.device, len(table), SHAPE)
    bench.loop.begin(table, SCALE, draw(), draw, recording)
    steps = []
    for index, timestep in enumerate(table.timesteps.tolist()):
        recording.mark_begin(bench.stream, index)
        bench.loop.step()
        recording.mark_end(bench.stream, index)
        steps.append(DeviceStep(index, len(table), timestep, recording, partial(bench.loop.estimate, table, index)))
    waits = bench.driver.count(*WAITS)
    expected = on_host(table, guided=True)
    # An early one is read when all have been enqueued; only that one is waited for.
    np.testing.assert_allclose(steps[2].latents, expected[2], rtol=1e-6, atol=1e-6)
    assert bench.driver.count(*WAITS) == waits + 1
    assert steps[2].latents is steps[2].latents
    assert not steps[2].latents.flags.writeable
    for step, wanted in zip(steps, expected, strict=True):
        np.testing.assert_allclose(step.latents, wanted, rtol=1e-6, atol=1e-6)
        assert step.seconds > 0
    bench.run(table)  # the next request leaves them alone
    np.testing.assert_allclose(recording.latents(3), expected[3], rtol=1e-6, atol=1e-6)


def test_stand_in_loop_goes_on_from_replaced_latents(make: Callable[..., Bench]) -> None:
    bench = make(guided=True)
    table = sampler_table("dpmpp_2m", Schedule(), 5)
    draw = batch_noise((1, 2), SHAPE[1:])
    other = np.full(SHAPE, 0.25, np.float32)
    bench.loop.begin(table, SCALE, draw(), draw)
    for index in range(len(table)):
        bench.loop.step()
        if index == 2:
            bench.loop.replace(other)

    def predict(x: Any, t: float) -> Any:
        unconditional, conditional = network(x, t, EMBEDDINGS[:2]), network(x, t, EMBEDDINGS[2:])
        return (conditional - unconditional) * np.float32(SCALE) + unconditional

    draw = batch_noise((1, 2), SHAPE[1:])
    host = denoise(table, draw(), predict, draw)
    for _ in range(3):
        next(host)
    host.send(other)
    (last,) = host
    np.testing.assert_allclose(bench.fetch(), last.latents, rtol=1e-6, atol=1e-6)


def test_stand_in_loop_starts_from_latents_that_are_on_the_gpu(make: Callable[..., Bench]) -> None:
    bench = make(guided=False)
    table = sampler_table("euler", Schedule(), 3)
    draw = batch_noise((1, 2), SHAPE[1:])
    initial = DeviceArray(bench.device, SHAPE)
    bench.driver.floats(initial.pointer, initial.nbytes // 4)[...] = draw().reshape(-1)
    bench.loop.begin(table, SCALE, initial.pointer, draw)
    for _ in range(len(table)):
        bench.loop.step()
    np.testing.assert_allclose(bench.fetch(), on_host(table, guided=False)[-1], rtol=1e-6, atol=1e-6)


def test_stand_in_engine_that_cannot_be_captured_runs_without_a_graph_and_says_why(make: Callable[..., Bench]) -> None:
    bench = make(guided=True, capturable=False)
    table = sampler_table("euler", Schedule(), 6)
    with pytest.warns(SdrtWarning, match="denoising runs without a CUDA graph: CUDA failed in cuStreamEndCapture"):
        found = bench.run(table)
    np.testing.assert_allclose(found, on_host(table, guided=True)[-1], rtol=1e-6, atol=1e-6)
    assert "CAPTURE_INVALIDATED" in str(bench.loop.graph_obstacle)
    bench.run(table)  # it is tried once, and said once
    assert bench.driver.count("cuStreamBeginCapture") == 1
    assert bench.driver.count("cuGraphLaunch") == 0


def test_stand_in_engine_that_captures_by_itself_is_left_alone(make: Callable[..., Bench]) -> None:
    bench = make(guided=True)
    bench.loop.graph_obstacle = "it captures its own"
    bench.run(sampler_table("euler", Schedule(), 4))
    assert bench.driver.count("cuStreamBeginCapture") == 0


def test_stand_in_graph_is_made_anew_when_the_engines_memory_has_moved(make: Callable[..., Bench]) -> None:
    bench = make(guided=True)
    table = sampler_table("plms", Schedule(), 6)
    bench.run(table)
    bench.engine.version += 1
    np.testing.assert_allclose(bench.run(table), on_host(table, guided=True)[-1], rtol=1e-6, atol=1e-6)
    assert bench.driver.count("cuGraphInstantiate") == 2
    assert bench.driver.count("cuGraphExecDestroy") == 1


def test_stand_in_uploads_of_the_next_request_wait_for_those_of_the_last(make: Callable[..., Bench]) -> None:
    # Nothing of the first request has run when the second overwrites the memory that it is uploaded from.
    bench = make(guided=True)
    first, second = sampler_table("euler_a", Schedule(), 5), sampler_table("euler", Schedule(), 4)
    draw = batch_noise((1, 2), SHAPE[1:])
    bench.loop.begin(first, SCALE, draw(), draw)
    for _ in range(len(first)):
        bench.loop.step()
    result = DeviceArray(bench.device, SHAPE)
    bench.stream.copy(result.pointer, bench.loop.result, result.nbytes)
    result.written_by(bench.stream)
    np.testing.assert_allclose(bench.run(second), on_host(second, guided=True)[-1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result.numpy(), on_host(first, guided=True)[-1], rtol=1e-6, atol=1e-6)


def whole_request(driver: DriverStandIn) -> None:
    with ExitStack() as stack:
        bench = Bench(driver, stack, guided=True)
        table = sampler_table("euler_a", Schedule(), 4)
        draw = batch_noise((1, 2), SHAPE[1:])
        recording = Recording(bench.device, len(table), SHAPE)
        bench.loop.begin(table, SCALE, draw(), draw, recording)
        for index in range(len(table)):
            recording.mark_begin(bench.stream, index)
            bench.loop.step()
            recording.mark_end(bench.stream, index)
        recording.latents(2)
        recording.seconds(2)
        bench.loop.replace(np.zeros(SHAPE, np.float32))
        bench.run(sampler_table("ddpm", Schedule(), 9))


def failure_of(number: int, driver: DriverStandIn) -> str | None:
    driver.fail_at = number
    try:
        whole_request(driver)
    except BackendError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore::sdrt.errors.SdrtWarning")
def test_stand_in_any_call_of_a_request_may_fail_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's keeps the frames, and all that is in them
    whole = DriverStandIn()
    with nothing_left(whole):
        whole_request(whole)
    quiet = []
    for number, name in enumerate(whole.calls):
        driver = DriverStandIn()
        with garbage_collected():
            message = failure_of(number, driver)
        # A context that cannot be entered is lost, with all that is in it and waits for the garbage collector.
        assert driver.left() == {} or (message is None and name == "cuCtxPushCurrent"), f"call {number}, {name}"
        if message is None:
            quiet.append(name)
        else:
            assert "CUDA_ERROR_LAUNCH_FAILED" in message, f"call {number}, {name}"
    # What can fail without the request failing is the capture, for which there is another way, and what the garbage
    # collector frees, which can only print.
    capture = {"cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuLaunchKernel"}
    contexts = {"cuCtxPushCurrent", "cuCtxPopCurrent", "cuDevicePrimaryCtxRelease"}
    assert set(quiet) <= {*capture, *contexts, "cuMemFree", "cuEventDestroy"}
    assert capture <= set(quiet)
    assert len(quiet) < len(whole.calls) / 3


def test_stand_in_request_without_memory_fails_and_the_next_succeeds(make: Callable[..., Bench]) -> None:
    bench = make(guided=True)
    table, huge = sampler_table("ddpm", Schedule(), 4), sampler_table("ddpm", Schedule(), 1000)
    bench.driver.total = bench.driver.used + 100_000
    with pytest.raises(DeviceMemoryError, match="the sampler's table and noise: ") as error:
        bench.run(huge)
    assert error.value.asked is not None
    assert error.value.free is not None
    assert error.value.asked > error.value.free
    np.testing.assert_allclose(bench.run(table), on_host(table, guided=True)[-1], rtol=1e-6, atol=1e-6)
