"""onnxruntime's CUDA provider as a session, over STAND-INS for onnxruntime and the driver. No GPU is involved."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.errors import BackendError, DeviceMemoryError, InputError
from sdrt.runtime.cuda import Device, Stream
from sdrt.runtime.device_engines import DeviceEngines
from sdrt.runtime.device_onnx import OnnxCudaSession
from sdrt.runtime.request import make_request

from .driver_stand_in import DriverStandIn, nothing_left
from .tensorrt_stand_in import compute, manifest
from .test_tensorrt_stand_in import SMALL, Machine, noise, passages, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdrt.engines.manifest import Component


class OnnxruntimeStandIn(types.ModuleType):
    """Stands in for the module: runs a known function in the stream that it was given.

    Attributes
    ----------
    captures
        Whether a graph can be captured: when it is loaded, or when it first runs.
    fails
        The message of the next run's failure.
    providers
        What a session has got.

    """

    def __init__(self, driver: DriverStandIn) -> None:
        super().__init__("onnxruntime")
        self.driver = driver
        self.captures = "always"
        self.fails: str | None = None
        self.providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        self.sessions: list[Any] = []
        self.SessionOptions = types.SimpleNamespace

    def RunOptions(self) -> Any:  # noqa: N802 - onnxruntime's name
        entries: dict[str, str] = {}
        return types.SimpleNamespace(entries=entries, add_run_config_entry=entries.__setitem__)

    def InferenceSession(self, graph: Path, _options: Any, providers: list[Any]) -> Any:  # noqa: N802 - onnxruntime's name
        options = providers[0][1]
        if self.captures == "never" and options["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature\nmore")
        session = _Session(self, graph.stem, options)
        self.sessions.append(session)
        return session


class _Session:
    def __init__(self, module: OnnxruntimeStandIn, name: str, options: dict[str, str]) -> None:
        self.module, self.name, self.options = module, name, options
        self.graphs: dict[str, Any] = {}

    def get_providers(self) -> list[str]:
        return self.module.providers

    def io_binding(self) -> Any:
        bound: dict[str, Any] = {}

        def bind(name: str, kind: str, ordinal: int, element: Any, shape: Any, address: int) -> None:
            assert (kind, ordinal) == ("cuda", 0)
            nbytes = int(np.prod(shape)) * np.dtype(element).itemsize
            bound[name] = self.module.driver.view(address, nbytes).view(element).reshape(shape)

        return types.SimpleNamespace(bound=bound, bind_input=bind, bind_output=bind)

    def run_with_iobinding(self, io: Any, options: Any) -> None:
        assert options.entries["disable_synchronize_execution_providers"] == "1"
        module, stream = self.module, int(self.options["user_compute_stream"])
        assert module.driver.live["stream"][stream].captured is None, "it captures by itself, or not at all"
        if module.fails is not None:
            message, module.fails = module.fails, None
            raise RuntimeError(message)
        bound = io.bound
        if self.options["enable_cuda_graph"] == "1":
            if module.captures == "at load":
                raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
            # What a graph was captured with is what it is replayed with.
            bound = self.graphs.setdefault(options.entries["gpu_graph_id"], dict(bound))
            assert all(bound[name] is io.bound[name] for name in bound)
        else:
            bound = dict(bound)
        output = {"text_encoder": "text_embeddings", "unet": "prediction", "vae_decoder": "image"}[self.name]

        def work() -> None:
            bound[output][...] = compute(self.name, bound)

        module.driver.enqueue(stream, work)


class Onnx(Machine):
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch, manifest(((64, 64), (96, 64)), (1, 2), dynamic=True))
        self.onnxruntime = OnnxruntimeStandIn(self.driver)
        monkeypatch.setitem(sys.modules, "onnxruntime", self.onnxruntime)

    def engines(self) -> DeviceEngines:
        device = Device(0, self.driver)
        return DeviceEngines(
            self.manifest,
            device,
            lambda name, stream, _workspace: OnnxCudaSession(
                device, stream, Path(f"{name}.onnx"), self.component(name)
            ),
        )


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Onnx]:
    made = Onnx(tmp_path, monkeypatch)
    with nothing_left(made.driver):
        yield made


@pytest.fixture
def engines(machine: Onnx) -> Iterator[DeviceEngines]:
    opened = machine.engines()
    yield opened
    opened.close()


def check(machine: Onnx, engines: DeviceEngines) -> None:
    host = machine.host()
    for arguments in ({}, {"width": 96}, {"num_images_per_prompt": 2}, {"guidance_scale": 1.0}, {}):
        request = make_request(machine.manifest, "a", **(SMALL | {"seed": 3, "sampler": "euler_a"} | arguments))
        expected = run(host, request)
        np.testing.assert_allclose(run(engines, request), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(engines.decode(expected), host.decode(expected), rtol=1e-6)
        assert engines.encode(passages(request)).shape[2] == 6


def test_stand_in_provider_captures_a_graph_for_each_binding(machine: Onnx, engines: DeviceEngines) -> None:
    check(machine, engines)
    sessions = {session.name: session for session in machine.onnxruntime.sessions}
    assert len(sessions["unet"].graphs) >= 4
    assert sessions["unet"].options["use_tf32"] == "0"
    assert sessions["text_encoder"].options["enable_cuda_graph"] == "0"
    assert engines.graph_obstacle == "onnxruntime captures the network by itself"
    assert machine.driver.count("cuStreamBeginCapture") == 0


def test_stand_in_approximations_are_refused_and_what_covers_everything_is_not(
    machine: Onnx, engines: DeviceEngines
) -> None:
    request = machine.request(guidance_interval=(0.5, 5.0))
    with pytest.raises(BackendError, match="guidance, cache and encoder interval are for the CPU alone so far"):
        run(engines, request)
    whole = machine.request(guidance_interval=(0.0, 1000.0))
    np.testing.assert_array_equal(run(engines, whole), run(engines, machine.request()))
    with pytest.raises(
        InputError, match="no graph for feature caching: leave it out, or run an ONNX bundle on the CPU"
    ):
        machine.request(cache_interval=2)
    with pytest.raises(InputError, match="no graph for encoder reuse: leave it out, or run an ONNX bundle on the CPU"):
        machine.request(encoder_interval=2)


@pytest.mark.parametrize(
    ("captures", "why"), [("never", "cannot use the graph capture"), ("at load", "CUDA failure 900")]
)
def test_stand_in_provider_that_cannot_capture_runs_without_a_graph(
    machine: Onnx, engines: DeviceEngines, captures: str, why: str
) -> None:
    machine.onnxruntime.captures = captures
    check(machine, engines)
    assert why in str(engines.graph_obstacle)
    assert "\n" not in str(engines.graph_obstacle)


def test_stand_in_memory_that_onnxruntime_lacks_is_told_in_bytes(machine: Onnx, engines: DeviceEngines) -> None:
    check(machine, engines)
    request = make_request(machine.manifest, "a", **SMALL)
    machine.onnxruntime.fails = "BFCArena: Failed to allocate memory for requested buffer of size 123456789"
    with pytest.raises(DeviceMemoryError) as error:
        engines.latents(request, passages(request), noise(request))
    assert error.value.asked == 123456789
    check(machine, engines)


def test_stand_in_provider_without_its_libraries_is_refused(machine: Onnx, engines: DeviceEngines) -> None:
    machine.onnxruntime.providers = ["CPUExecutionProvider"]
    request = make_request(machine.manifest, "a", **SMALL)
    with pytest.raises(BackendError, match="onnxruntime cannot use the GPU"):
        engines.latents(request, passages(request), noise(request))


def test_the_names_of_onnxruntime_that_are_used_are_there() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnxruntime.RunOptions().add_run_config_entry("disable_synchronize_execution_providers", "1")
    onnxruntime.SessionOptions().log_severity_level = 3
    for name in ("io_binding", "run_with_iobinding", "get_providers"):
        assert hasattr(onnxruntime.InferenceSession, name)


def test_one_component_can_be_bound_and_closed(machine: Onnx) -> None:
    part: Component = machine.component("text_encoder")
    with Device(0, machine.driver) as device, device.current(), Stream(device) as stream:
        session = OnnxCudaSession(device, stream, Path("text_encoder.onnx"), part)
        binding = session.bind({"input_ids": (1, 7), "clip_skip": (1,), "text_embeddings": (1, 7, 6)})
        binding.place("text_embeddings", 0)
        binding.close()
        session.keep()
        session.close()
