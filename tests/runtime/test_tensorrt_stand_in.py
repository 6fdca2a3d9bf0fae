"""TensorRT's session and all engines at work, over STAND-INS for TensorRT and the driver. No GPU is involved."""

from __future__ import annotations

import dataclasses
import re
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import sdrt.runtime.tensorrt
from sdrt.errors import BackendError, DeviceMemoryError, InputError
from sdrt.runtime.cuda import Device, Stream
from sdrt.runtime.device_array import DeviceArray
from sdrt.runtime.device_engines import DeviceEngines
from sdrt.runtime.device_handover import hand_over
from sdrt.runtime.device_workspace import Workspace
from sdrt.runtime.host import HostEngines
from sdrt.runtime.noise import batch_noise
from sdrt.runtime.request import make_request
from sdrt.runtime.session import Passage
from sdrt.runtime.tensorrt import TensorRTSession, profile_of

from .driver_stand_in import DriverStandIn, garbage_collected, nothing_left
from .tensorrt_stand_in import (
    CudaGraphStrategy,
    DynamicShapesKernelSpecializationStrategy,
    NumpySession,
    TensorRTStandIn,
    manifest,
    write_plan,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdrt.engines.manifest import Component, Manifest
    from sdrt.runtime.request import Request

SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 5}


class Machine:
    """A driver, TensorRT, a bundle's plans, and engines over them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, bundle: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = bundle or manifest()
        self.driver = DriverStandIn()
        self.trt = TensorRTStandIn(self.driver, self.manifest)
        monkeypatch.setattr(sdrt.runtime.tensorrt, "load", lambda _backend: self.trt)

    def component(self, name: str) -> Component:
        (component,) = (part for part in self.manifest.components if part.name == name)
        return component

    def engines(self) -> DeviceEngines:
        device = Device(0, self.driver)

        def open_session(name: str, stream: Stream, workspace: Workspace) -> TensorRTSession:
            component = self.component(name)
            return TensorRTSession(
                device,
                stream,
                workspace=workspace,
                backend="tensorrt-rtx" if self.manifest.backend.name == "tensorrt-rtx" else "tensorrt",
                plan=write_plan(self.folder, component),
                component=component,
                cache=self.folder / "compiled" / f"{name}.cache",
            )

        return DeviceEngines(self.manifest, device, open_session)

    def host(self) -> HostEngines:
        return HostEngines(self.manifest, lambda name: NumpySession(self.component(name)))

    def request(self, **arguments: Any) -> Request:
        return make_request(self.manifest, "a", **(SMALL | {"seed": 3} | arguments))


def passages(request: Request) -> list[Passage]:
    ids = np.arange(14, dtype=np.int64).reshape(2, 7)
    count = len(request.seeds)
    if not request.guided:
        return [Passage(ids[:1], request.clip_skip, (0,) * count)]
    if request.clip_skip:
        return [Passage(ids[:1], 0, (0,) * count), Passage(ids[1:], request.clip_skip, (0,) * count)]
    return [Passage(ids, 0, (0,) * count + (1,) * count)]


def noise(request: Request) -> Any:
    return batch_noise(request.seeds, request.latent_shape)


def run(engines: Any, request: Request) -> Any:
    return engines.latents(request, passages(request), noise(request))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(tmp_path, monkeypatch)
    with nothing_left(made.driver):
        yield made


@pytest.fixture
def engines(machine: Machine) -> Iterator[DeviceEngines]:
    opened = machine.engines()
    yield opened
    opened.close()


@pytest.mark.parametrize("sampler", ["plms", "euler_a", "dpmpp_2m"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}, {"clip_skip": 2}, {"num_inference_steps": 1}],
)
def test_stand_in_engines_give_what_the_host_gives(
    machine: Machine, engines: DeviceEngines, sampler: str, arguments: dict[str, Any]
) -> None:
    request = machine.request(sampler=sampler, **arguments)
    host = machine.host()
    expected = run(host, request)
    np.testing.assert_allclose(run(engines, request), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(engines.decode(expected), host.decode(expected), rtol=1e-6)
    np.testing.assert_allclose(engines.encode(passages(request)), host.encode(passages(request)), rtol=1e-6)
    steps = list(engines.denoise(request, passages(request), noise(request)))
    wanted = list(host.denoise(request, passages(request), noise(request)))
    for step, other in zip(steps, wanted, strict=True):
        assert (step.index, step.total, step.timestep) == (other.index, other.total, other.timestep)
        np.testing.assert_allclose(step.latents, other.latents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", ["plms", "euler_a", "dpmpp_2m"])
def test_stand_in_estimates_are_those_of_the_host_until_the_loop_goes_on(
    machine: Machine, engines: DeviceEngines, sampler: str
) -> None:
    request = machine.request(sampler=sampler, num_inference_steps=7)
    wanted = list(machine.host().denoise(request, passages(request), noise(request)))
    steps = []
    for step in engines.denoise(request, passages(request), noise(request)):
        if step.index % 2:
            np.testing.assert_allclose(step.estimate, wanted[step.index].estimate, rtol=1e-4, atol=1e-5)
        steps.append(step)
    np.testing.assert_allclose(steps[1].estimate, wanted[1].estimate, rtol=1e-4, atol=1e-5)
    for gone in (steps[0], steps[-1] if len(steps) % 2 else steps[-2]):
        with pytest.raises(InputError, match=f"the estimate of step {gone.index} is gone"):
            _ = gone.estimate


def test_stand_in_addresses_are_set_once_and_weights_are_there_once(machine: Machine, engines: DeviceEngines) -> None:
    request = machine.request()
    for _ in range(3):
        run(engines, request)
    assert len(machine.trt.contexts) == 2  # text encoder and U-Net
    for context in machine.trt.contexts:
        assert [entry for entry in context.log if entry.startswith("address")] == [
            f"address {name}" for name in context.addresses
        ]
        assert context.log[0] == "profile 0"
    assert machine.driver.count("cuGraphInstantiate") == 1
    both = [engines.denoise(request, passages(request), noise(request)) for _ in range(2)]
    found = [next(loop).latents for loop in (*both, *both)]  # two requests at once, in turns
    assert len(machine.trt.contexts) == 3, "one more context of the same engine"
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[2], found[3])
    for loop in both:
        loop.close()


def test_stand_in_activations_are_shared_and_a_graph_follows_them(machine: Machine, engines: DeviceEngines) -> None:
    request = machine.request()
    host = machine.host()
    expected = run(host, request)
    run(engines, request)
    sizes = sorted(array.nbytes for array in machine.driver.live["memory"].values())
    assert 3000 in sizes, "the U-Net's, which is the larger one"
    assert 1000 not in sizes
    engines.decode(expected)  # the decoder needs more: the memory moves
    sizes = sorted(array.nbytes for array in machine.driver.live["memory"].values())
    assert 9000 in sizes
    assert 3000 not in sizes
    np.testing.assert_allclose(run(engines, request), expected, rtol=1e-5, atol=1e-6)
    assert machine.driver.count("cuGraphInstantiate") == 2
    assert {context.memory for context in machine.trt.contexts} == {machine.trt.contexts[0].memory}


def test_stand_in_previews_in_the_middle_of_a_loop_do_no_harm(machine: Machine, engines: DeviceEngines) -> None:
    request = machine.request()
    expected = [step.latents for step in machine.host().denoise(request, passages(request), noise(request))]
    found = []
    for step in engines.denoise(request, passages(request), noise(request)):
        engines.decode(step.latents)
        run(engines, machine.request(seed=9))
        found.append(step.latents)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_stand_in_run_copies_and_waits_before_the_first_step_and_after_the_last(
    machine: Machine, engines: DeviceEngines
) -> None:
    request = machine.request(num_inference_steps=20)
    run(engines, request)
    before = len(machine.driver.calls)
    run(engines, request)
    calls = machine.driver.calls[before:]
    first, last = calls.index("cuLaunchKernel"), len(calls) - 1 - calls[::-1].index("cuGraphLaunch")
    assert set(calls[first + 1 : last + 1]) == {"cuGraphLaunch"}
    assert calls.count("cuGraphLaunch") == len(request.table)
    waits = [name for name in calls if name.endswith("Synchronize")]
    assert waits == ["cuEventSynchronize"] * 2  # for the uploads of the last request, and for the result


def test_stand_in_engine_that_rtx_does_not_let_be_captured_captures_itself(
    machine: Machine, engines: DeviceEngines
) -> None:
    machine.trt.capturable = False
    request = machine.request()
    found = run(engines, request)
    np.testing.assert_allclose(found, run(machine.host(), request), rtol=1e-5, atol=1e-6)
    assert engines.graph_obstacle == "tensorrt-rtx does not let unet be captured; it captures it by itself"
    assert machine.driver.count("cuStreamBeginCapture") == 0
    assert machine.trt.contexts[-1].config.cuda_graph_strategy == CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


def test_stand_in_tensor_that_the_host_reads_is_in_the_hosts_memory(machine: Machine, engines: DeviceEngines) -> None:
    machine.trt.on_host = {"clip_skip"}
    request = machine.request(clip_skip=1)
    np.testing.assert_allclose(run(engines, request), run(machine.host(), request), rtol=1e-5, atol=1e-6)


def test_stand_in_compiled_kernels_are_kept_for_the_next_start(machine: Machine) -> None:
    request = machine.request()
    for _ in range(2):
        engines = machine.engines()
        expected = run(engines, request)
        engines.close()
    assert sorted(machine.trt.compiled) == ["text_encoder-2x7", "unet-2x4x8x8"]
    strategy = machine.trt.contexts[0].config.dynamic_shapes_kernel_specialization_strategy
    assert strategy == DynamicShapesKernelSpecializationStrategy.EAGER
    # Of another GPU they are of no use: everything is compiled again, and kept.
    machine.trt.environment = b"another GPU"
    engines = machine.engines()
    np.testing.assert_array_equal(run(engines, request), expected)
    engines.close()
    assert len(machine.trt.compiled) == 4
    assert (machine.folder / "compiled" / "unet.cache").read_bytes().startswith(b"another GPU:")
    assert [path.suffix for path in (machine.folder / "compiled").iterdir()] == [".cache"] * 2


def test_stand_in_plan_that_does_not_load_says_why(machine: Machine, engines: DeviceEngines) -> None:
    machine.trt.fails = "Serialization assertion failed:\n  another version"
    with pytest.raises(BackendError, match=r"does not load .*\.plan: Serialization assertion failed: another version"):
        run(engines, machine.request())
    run(engines, machine.request())


def test_stand_in_engine_without_memory_fails_and_the_next_request_succeeds(
    machine: Machine, engines: DeviceEngines
) -> None:
    request = machine.request()
    run(engines, request)
    machine.trt.fails = "Requested amount of GPU memory (12345678 bytes) could not be allocated."
    with pytest.raises(DeviceMemoryError) as error:
        run(engines, request)
    assert error.value.asked == 12345678
    assert error.value.free == machine.driver.total - machine.driver.used or error.value.free
    np.testing.assert_allclose(run(engines, request), run(machine.host(), request), rtol=1e-5, atol=1e-6)


def test_stand_in_idle_buffers_make_room_before_a_request_fails(machine: Machine, engines: DeviceEngines) -> None:
    run(engines, machine.request())
    run(engines, machine.request(guidance_scale=1.0))
    machine.driver.total = machine.driver.used + 8000
    request = machine.request(num_images_per_prompt=2)
    np.testing.assert_allclose(run(engines, request), run(machine.host(), request), rtol=1e-5, atol=1e-6)
    assert machine.driver.count("cuGraphExecDestroy") == 2
    machine.driver.total = machine.driver.used + 8000
    with pytest.raises(DeviceMemoryError, match="bytes of GPU memory"):
        run(engines, machine.request(num_inference_steps=500, sampler="ddpm"))
    run(engines, machine.request())


def test_stand_in_engine_larger_than_the_memory_is_refused_before_it_is_loaded(
    machine: Machine, engines: DeviceEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.driver, "cuMemGetInfo", lambda: (0, 10, 1000), raising=False)
    with pytest.raises(DeviceMemoryError, match="the engine of unet: 12 bytes of GPU memory are needed and 10 "):
        run(engines, machine.request())


def test_stand_in_bundle_of_other_tensors_is_refused(machine: Machine, engines: DeviceEngines) -> None:
    part = machine.trt.manifest.components[1]
    renamed = dataclasses.replace(part, outputs=(dataclasses.replace(part.outputs[0], name="noise"),))
    machine.trt.manifest = dataclasses.replace(
        machine.trt.manifest, components=(machine.trt.manifest.components[0], renamed)
    )
    with pytest.raises(BackendError, match=r"has the tensors latents, noise, .*: expected latents, prediction"):
        run(engines, machine.request())


def test_a_size_that_no_profile_takes_is_refused_with_those_that_there_are() -> None:
    unet = manifest(((64, 64), (96, 64)), (1,)).components[1]
    with pytest.raises(InputError) as error:
        profile_of(unet, {"latents": (2, 4, 12, 12), "timestep": (1,), "text_embeddings": (2, 7, 6)})
    assert str(error.value).startswith(
        "unet takes no latents of 2x4x12x12: this bundle's engine takes "
        "2x4x8x8, 1x4x8x8, 2x4x8x12, 1x4x8x12. These are batch, channels, height / 8 and width / 8"
    )


def test_the_profile_that_is_fastest_at_a_shape_is_chosen() -> None:
    unet = manifest(((64, 64), (96, 64)), (1, 2)).components[1]

    def chosen(rows: int, height: int, width: int) -> int:
        return profile_of(
            unet, {"latents": (rows, 4, height, width), "timestep": (1,), "text_embeddings": (rows, 7, 6)}
        )

    assert [unet.profiles[chosen(*shape)]["latents"].opt for shape in [(2, 8, 8), (1, 8, 12), (4, 8, 12)]] == [
        (2, 4, 8, 8),
        (1, 4, 8, 12),
        (4, 4, 8, 12),
    ]
    wide = manifest(((64, 64), (96, 128)), (1, 3), dynamic=True).components[1]
    assert len(wide.profiles) == 1
    assert profile_of(wide, {"latents": (5, 4, 10, 11), "timestep": (1,), "text_embeddings": (5, 7, 6)}) == 0
    two = dataclasses.replace(wide, profiles=(*wide.profiles, *unet.profiles))
    assert profile_of(two, {"latents": (2, 4, 8, 12), "timestep": (1,), "text_embeddings": (2, 7, 6)}) > 0


class Theirs:
    def __init__(self, array: DeviceArray) -> None:
        self.array = array
        self.__cuda_array_interface__ = array.__cuda_array_interface__ | {"stream": None}


@pytest.mark.parametrize("images", [False, True])
def test_stand_in_result_stays_on_the_gpu_in_the_callers_stream(
    machine: Machine, engines: DeviceEngines, *, images: bool
) -> None:
    request = machine.request(num_images_per_prompt=2)
    host = machine.host()
    wanted = run(host, request)
    wanted = host.decode(wanted) if images else wanted
    device = engines.device

    def given(**more: Any) -> DeviceArray:
        arguments = request, passages(request), noise(request)
        return hand_over(engines, *arguments, images=images, **({"initial": None, "out": None, "stream": None} | more))

    given()  # what is loaded and allocated once is waited for
    with device.current(), Stream(device) as theirs:
        # The caller's stream fills the start when it gets to it, and reads the result after it: nobody waits.
        start, out = DeviceArray(device, (2, *request.latent_shape)), DeviceArray(device, wanted.shape)
        machine.driver.enqueue(
            theirs.pointer,
            lambda: np.copyto(machine.driver.floats(start.pointer, start.nbytes // 4), noise(request)().reshape(-1)),
        )
        seen: list[Any] = []
        before = len(machine.driver.calls)
        draw = noise(request)
        draw()
        result = hand_over(
            engines,
            request,
            passages(request),
            draw,
            images=images,
            initial=Theirs(start),
            out=Theirs(out),
            stream=theirs.pointer,
        )
        machine.driver.enqueue(
            theirs.pointer, lambda: seen.append(machine.driver.floats(out.pointer, out.nbytes // 4).copy())
        )
        waits = [name for name in machine.driver.calls[before:] if name.endswith("Synchronize")]
        assert waits == ["cuEventSynchronize"], "for the upload of the request before, which is long done"
        theirs.synchronize()
        np.testing.assert_allclose(seen[0].reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-6)
        assert (result.pointer, result.shape) == (out.pointer, wanted.shape)
        np.testing.assert_allclose(given().numpy(), wanted, rtol=1e-5, atol=1e-6)
        for bad, message in [(0, "stream is 0"), (True, "stream is True"), ("x", "stream is 'x'")]:
            with pytest.raises(InputError, match=message):
                given(stream=bad)
        crooked = Theirs(out)
        crooked.__cuda_array_interface__["data"] = (out.pointer + 4, False)
        with pytest.raises(InputError, match="expected a multiple of 256"):
            given(out=crooked)


def test_stand_in_threads_get_what_they_would_get_alone(machine: Machine, engines: DeviceEngines) -> None:
    alone = {seed: run(machine.host(), machine.request(seed=seed)) for seed in range(4)}
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        request = machine.request(seed=seed)
        for step in engines.denoise(request, passages(request), noise(request)):
            found[seed] = step.latents

    threads = [threading.Thread(target=work, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in alone.items():
        np.testing.assert_allclose(found[seed], expected, rtol=1e-5, atol=1e-6)


def test_stand_in_engines_close_though_a_loop_was_never_finished(machine: Machine) -> None:
    engines = machine.engines()
    request = machine.request()
    loop = engines.denoise(request, passages(request), noise(request))
    step = next(loop)
    engines.close()
    assert step.latents.shape == (1, 4, 8, 8)
    with pytest.raises(InputError, match="closed"):
        next(loop)
    engines.close()


@pytest.mark.filterwarnings("ignore::sdrt.errors.SdrtWarning")
def test_stand_in_any_call_may_fail_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's keeps the frames, and all that is in them

    def session(fail_at: int | None) -> tuple[DriverStandIn, str | None]:
        machine = Machine(tmp_path, monkeypatch)
        machine.driver.fail_at = fail_at
        request = machine.request(num_inference_steps=2, sampler="euler")
        try:
            with ExitStack() as stack:
                engines = machine.engines()
                stack.callback(engines.close)
                engines.decode(run(engines, request))
        except BackendError as error:
            return machine.driver, str(error)
        return machine.driver, None

    whole, _ = session(None)
    numbers = [number for number, name in enumerate(whole.calls) if not name.startswith("cuCtx")]
    for number in numbers:
        with garbage_collected():
            driver, message = session(number)
        assert driver.left() == {}, f"call {number}, {whole.calls[number]}: {message}"


def test_the_real_tensorrt_rtx_tells_why_it_does_not_load_a_damaged_plan(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    driver = DriverStandIn()
    component = manifest().components[1]
    plan = tmp_path / "unet.plan"
    plan.write_bytes(b"no plan at all" * 100)
    with Device(0, driver) as device, device.current(), Stream(device) as stream:
        with pytest.raises(BackendError, match=r"tensorrt-rtx does not load .*unet\.plan: .*Serialization") as error:
            TensorRTSession(
                device,
                stream,
                workspace=Workspace(device, stream),
                backend="tensorrt-rtx",
                plan=plan,
                component=component,
                cache=tmp_path / "cache",
            )
        assert "\n" not in str(error.value)
    plan.unlink()  # nothing holds it


def test_every_name_of_tensorrt_that_is_used_is_there() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    text = Path(sdrt.runtime.tensorrt.__file__).read_text(encoding="utf-8")
    classes = (trt.Runtime, trt.ICudaEngine, trt.IExecutionContext, trt.IRuntimeConfig, trt.IRuntimeCache)
    names = set(re.findall(r"(?:engine|context|config|_runtime|_cache)\.([a-z]\w+)\(", text))
    names -= {"context", "close", "reserve"}
    assert len(names) >= 18
    for name in names:
        assert any(hasattr(part, name) for part in classes), name
    for name in re.findall(r"\btrt\.([A-Z]\w+)", text):
        assert hasattr(trt, name), name
