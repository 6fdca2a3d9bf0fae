"""What only a real NVIDIA GPU can show: ``pytest -m gpu tests/test_gpu.py``. Nothing here is a stand-in."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import sdrt
from sdrt.engines.build import build_engines
from sdrt.engines.bundle import Bundle
from sdrt.engines.devices import nvidia_gpus
from sdrt.errors import BackendError, DeviceMemoryError, InputError
from sdrt.runtime.cuda import Buffer, Device, Event, PinnedBuffer, Stream
from sdrt.runtime.device_array import DeviceArray
from sdrt.runtime.device_engines import DeviceEngines
from sdrt.runtime.device_kernel import CONTROL, DEPTH, StepKernel, pack
from sdrt.runtime.loop import denoise
from sdrt.runtime.noise import batch_noise
from sdrt.runtime.samplers import SAMPLERS, sampler_table
from sdrt.runtime.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.gpu

SMALL: dict[str, Any] = {"num_inference_steps": 6, "width": 64, "height": 64, "seed": 3, "negative_prompt": "blurry"}
SHAPE = (2, 4, 9, 11)


@pytest.fixture
def device() -> Iterator[Device]:
    if not nvidia_gpus():
        pytest.fail("these tests need an NVIDIA GPU, and the CUDA driver shows none")
    with Device() as opened, opened.current():
        yield opened


def upload(stream: Stream, stack: ExitStack, device: Device, array: Any) -> Buffer:
    data = np.ascontiguousarray(array)
    buffer = stack.enter_context(Buffer(device, data.nbytes))
    stream.copy_in(buffer.pointer, data.ctypes.data, data.nbytes)
    stream.synchronize()
    return buffer


def download(stream: Stream, buffer: Buffer, like: Any) -> Any:
    stream.synchronize()
    array = np.empty_like(like)
    buffer._device.call("cuMemcpyDtoH", array.ctypes.data, buffer.pointer, array.nbytes)
    return array


def test_memory_streams_events_and_graphs(device: Device) -> None:
    with Stream(device) as stream, PinnedBuffer(device, 16) as pinned, Buffer(device, 16) as one:
        pinned.view[:] = bytes(range(16))
        with Event(device) as began, Event(device) as ended, Buffer(device, 16) as two:
            stream.record(began)
            stream.copy_in(one.pointer, pinned.pointer, 16)
            with stream.capture(lambda: stream.copy(two.pointer, one.pointer, 16)) as graph:
                graph.launch(stream)
            stream.record(ended)
            ended.wait()
            assert ended.seconds_since(began) > 0
            assert download(stream, two, np.empty(16, np.uint8)).tolist() == list(range(16))
    free, total = device.memory()
    with pytest.raises(DeviceMemoryError) as error:
        Buffer(device, 2 * total)
    assert error.value.asked == 2 * total
    assert 0 < (error.value.free or 0) <= total
    assert free > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_kernel_takes_the_hosts_steps_to_the_last_bit(device: Device, sampler: str) -> None:
    table = sampler_table(sampler, Schedule(), 7, eta=0.5 if sampler == "ddim" else 0.0)
    size = int(np.prod(SHAPE))
    predictions = iter(np.random.default_rng(0).normal(size=(len(table), 2, *SHAPE)).astype(np.float32))
    kept = []

    def predict(_x: Any, _t: float) -> Any:
        unconditional, conditional = next(predictions)
        kept.append(np.concatenate([unconditional, conditional]))
        return (conditional - unconditional) * np.float32(7.5) + unconditional

    draw = batch_noise([1, 2], SHAPE[1:])
    expected = [step.latents for step in denoise(table, draw(), predict, draw)]
    draw = batch_noise([1, 2], SHAPE[1:])
    first = draw()
    rows, added = pack(table, 7.5)
    drawn = [(draw(), used) for used in added]
    with ExitStack() as stack:
        stream = stack.enter_context(Stream(device))
        kernel = StepKernel(device)
        stack.callback(kernel.close)
        noise = np.stack([part for part, used in drawn if used]) if any(added) else np.zeros(1, np.float32)
        buffers = {
            "latents": upload(stream, stack, device, np.concatenate([first, np.full_like(first, np.nan)])),
            "prediction": upload(stream, stack, device, np.full((2, *SHAPE), np.nan, np.float32)),
            "previous": upload(stream, stack, device, np.full(SHAPE, np.nan, np.float32)),
            "history": upload(stream, stack, device, np.full((DEPTH, *SHAPE), np.nan, np.float32)),
            "timestep": upload(stream, stack, device, np.zeros(1, np.float32)),
            "rows": upload(stream, stack, device, rows),
            "noise": upload(stream, stack, device, noise),
            "trajectory": upload(stream, stack, device, np.zeros((len(rows), *SHAPE), np.float32)),
        }
        control = np.zeros(1, CONTROL)
        control["count"], control["stride"] = len(rows), size
        for name in ("rows", "noise", "trajectory"):
            control[name] = buffers[name].pointer
        state = upload(stream, stack, device, control)
        named = {name: buffers[name].pointer for name in ("prediction", "latents", "previous", "history", "timestep")}

        def launch() -> None:
            kernel.launch(stream, control=state.pointer, size=size, guided=True, **named)

        launch()
        for index, prediction in enumerate(kept):
            assert download(stream, buffers["timestep"], np.zeros(1, np.float32))[0] == np.float32(
                table.timesteps[index]
            )
            stream.copy_in(buffers["prediction"].pointer, prediction.ctypes.data, prediction.nbytes)
            launch()
        found = download(stream, buffers["trajectory"], np.zeros((len(rows), *SHAPE), np.float32))
    for index, wanted in enumerate(expected):
        np.testing.assert_array_equal(found[1 + index], wanted)


def test_torch_takes_an_array_without_a_copy(device: Device) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    with Stream(device) as stream:
        array = DeviceArray(device, (3, 5))
        values = np.arange(15, dtype=np.float32)
        stream.copy_in(array.pointer, values.ctypes.data, values.nbytes)
        tensor = torch.from_dlpack(array.written_by(stream))
        assert tensor.data_ptr() == array.pointer
        assert tensor.cpu().numpy().tolist() == values.reshape(3, 5).tolist()
        also = torch.as_tensor(array, device="cuda")
        assert also.data_ptr() == array.pointer


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt", "onnx"])
def pipe(request: pytest.FixtureRequest, tiny_fp16_bundle: Path, tmp_path_factory: Any) -> Iterator[sdrt.Pipeline]:
    """The small model, by every backend that is installed and takes this GPU."""
    backend = request.param
    if backend == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime has no CUDA here")
        folder = tiny_fp16_bundle
    else:
        if importlib.util.find_spec(backend.replace("-", "_")) is None:
            pytest.skip(f"{backend} is not installed")
        folder = tmp_path_factory.mktemp("engines") / backend
        try:
            build_engines(
                Bundle.open(tiny_fp16_bundle),
                backend=backend,
                targets=("native",),
                sizes=((64, 64),),
                images=(1, 2),
                output=folder,
            )
        except InputError as error:
            pytest.skip(str(error))  # no engines for this GPU
    with sdrt.load(folder) as pipeline:
        assert isinstance(pipeline._at_work(), DeviceEngines)
        yield pipeline


@pytest.fixture(scope="module")
def on_cpu(tiny_fp16_bundle: Path) -> Iterator[sdrt.Pipeline]:
    from sdrt.runtime.backends import _onnx_session
    from sdrt.runtime.host import HostEngines

    bundle = Bundle.open(tiny_fp16_bundle)
    with sdrt.Pipeline(bundle) as pipeline:
        pipeline._engines = HostEngines(bundle.manifest, lambda name: _onnx_session(bundle, name))
        yield pipeline


def psnr(found: Any, wanted: Any) -> float:
    square = float(np.mean((np.asarray(found, np.float64) - wanted) ** 2))
    return float(10 * np.log10((np.max(wanted) - np.min(wanted)) ** 2 / max(square, 1e-20)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("more", [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}, {"clip_skip": 1}])
def test_latents_are_those_of_the_cpu(
    pipe: sdrt.Pipeline, on_cpu: sdrt.Pipeline, sampler: str, more: dict[str, Any]
) -> None:
    options = SMALL | {"sampler": sampler} | more
    wanted = on_cpu("Great Wall photo", output_type="latent", **options)
    assert psnr(pipe("Great Wall photo", output_type="latent", **options), wanted) > 30
    assert psnr([step.latents for step in pipe.steps("Great Wall photo", **options)][-1], wanted) > 30
    images = pipe.decode(np.stack(wanted))
    assert psnr(images, on_cpu.decode(np.stack(wanted))) > 30


def test_a_request_is_the_same_again_and_from_a_graph(pipe: sdrt.Pipeline) -> None:
    first, again = (pipe("Great Wall photo", output_type="latent", **SMALL) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    print(f"graph: {pipe.graph_obstacle or 'captured'}")  # noqa: T201 - what to look for on a new machine


def test_results_stay_on_the_gpu_in_torchs_stream(pipe: sdrt.Pipeline) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    wanted = pipe("Great Wall photo", output_type="latent", **SMALL)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = torch.empty(1, 4, 8, 8, device="cuda")
        result = pipe.on_device("Great Wall photo", output_type="latent", out=out, stream=stream.cuda_stream, **SMALL)
        doubled = out * 2
    stream.synchronize()
    np.testing.assert_array_equal(doubled.cpu().numpy(), 2 * np.stack(wanted))
    assert result.pointer == out.data_ptr()
    image = torch.from_dlpack(pipe.on_device("Great Wall photo", **SMALL))
    assert image.shape == (1, 3, 64, 64)
    assert bool(torch.isfinite(image).all())


def test_engines_of_another_gpu_are_refused(tiny_fp16_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    other = "sm75" if nvidia_gpus()[0].compute_capability != "7.5" else "sm86"
    bundle = build_engines(
        Bundle.open(tiny_fp16_bundle),
        backend="tensorrt-rtx",
        targets=(other,),
        sizes=((64, 64),),
        output=tmp_path / "x",
    )
    with pytest.raises(BackendError, match="its engines are for compute capability"):
        sdrt.load(bundle.folder)


def test_the_driver_is_the_one_that_the_bindings_see(device: Device) -> None:
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    count = ctypes.c_int()
    assert driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    assert count.value == len(nvidia_gpus())
