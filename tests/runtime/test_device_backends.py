"""Which bundles a machine takes, told from the manifest alone; the GPUs of these machines are made up."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import sys
import time
import types
from typing import TYPE_CHECKING, Any

import pytest

from sdrt.engines.bundle import Bundle
from sdrt.engines.devices import Gpu
from sdrt.errors import BackendError, SdrtWarning
from sdrt.runtime import backends
from sdrt.runtime.host import HostEngines
from sdrt.runtime.pipeline import Pipeline

from .tensorrt_stand_in import VERSION, manifest

if TYPE_CHECKING:
    from pathlib import Path

RTX3090 = Gpu(0, "NVIDIA GeForce RTX 3090", "8.6", 24 * 2**30)
RTX4090 = Gpu(1, "NVIDIA GeForce RTX 4090", "8.9", 24 * 2**30)


def bundle(folder: Path, **backend: Any) -> Bundle:
    whole = manifest()
    return Bundle(folder, dataclasses.replace(whole, backend=dataclasses.replace(whole.backend, **backend)))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine on which the bundle runs, to be changed by the test."""
    found: dict[str, Any] = {"gpus": (RTX3090,), "version": VERSION, "missing": (), "platform": "linux_x86_64"}
    monkeypatch.setattr(backends, "nvidia_gpus", lambda: found["gpus"])
    monkeypatch.setattr(backends, "_version", lambda _module: found["version"])
    monkeypatch.setattr(backends, "_installed", lambda module: module not in found["missing"])
    monkeypatch.setattr(backends, "host_platform", lambda: found["platform"])
    return found


def test_engines_for_this_machine_are_taken(tmp_path: Path, machine: dict[str, Any]) -> None:
    assert backends.obstacle(bundle(tmp_path)) is None
    machine["gpus"] = (RTX4090, RTX3090)  # the second one will do
    assert backends.obstacle(bundle(tmp_path)) is None


COMMAND = "build it here with sdrt build --ckpt v1-1 --backend tensorrt-rtx --target"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"gpus": (RTX4090,)},
            f"its engines are for compute capability 8.6, and the NVIDIA GeForce RTX 4090 has 8.9: {COMMAND} sm89",
        ),
        (
            {"version": "1.8.0.2"},
            (
                f"its engines are of tensorrt-rtx {VERSION}, and 1.8.0.2 is installed: {COMMAND} sm86, "
                f"or pip install tensorrt-rtx=={VERSION}"
            ),
        ),
        (
            {"platform": "windows_amd64"},
            f"its engines are for linux_x86_64, and this is windows_amd64: {COMMAND} sm86",
        ),
        (
            {"gpus": ()},
            "it needs an NVIDIA GPU, and the CUDA driver shows none: build an ONNX bundle for this machine",
        ),
        ({"missing": ("tensorrt_rtx",)}, "tensorrt_rtx is not installed: run pip install 'sdrt[rtx]'"),
        ({"missing": ("cuda.bindings",)}, "cuda.bindings is not installed: run pip install 'sdrt[rtx]'"),
    ],
)
def test_engines_for_another_machine_are_refused_with_both_values(
    tmp_path: Path, machine: dict[str, Any], change: dict[str, Any], expected: str
) -> None:
    machine |= change
    began = time.perf_counter()
    found = backends.obstacle(bundle(tmp_path))
    assert time.perf_counter() - began < 0.1
    assert found == expected
    with pytest.raises(BackendError, match="cannot be run here: "):
        Pipeline(bundle(tmp_path))


def test_a_refusal_loads_no_backend(tmp_path: Path, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    machine["gpus"] = (RTX4090,)
    for module in ("tensorrt_rtx", "tensorrt", "onnxruntime", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, module, None)  # importing any fails
    assert "8.9" in str(backends.obstacle(bundle(tmp_path)))


def test_the_installed_version_is_found_without_loading_it() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from importlib import metadata

    assert metadata.version("tensorrt_rtx") == trt.__version__


def test_graphs_run_on_the_cpu_unless_onnxruntime_has_cuda_and_there_is_a_gpu(
    tmp_path: Path, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = types.ModuleType("onnxruntime")
    onnxruntime.__spec__ = importlib.machinery.ModuleSpec("onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", onnxruntime)
    monkeypatch.setattr(backends, "_onnx_on_gpu", lambda _bundle, gpu: gpu)
    graphs = bundle(tmp_path, name="onnx", compute_capabilities=(), platform=None)

    def chosen(*providers: str) -> Any:
        onnxruntime.get_available_providers = lambda: [*providers, "CPUExecutionProvider"]  # type: ignore[attr-defined]
        return backends.open_engines(graphs)

    assert chosen("CUDAExecutionProvider") == RTX3090
    assert isinstance(chosen(), HostEngines)
    machine["missing"] = ("cuda.bindings",)
    with pytest.warns(SdrtWarning, match=r"running on the CPU, .* cuda-bindings is not installed"):
        assert isinstance(chosen("CUDAExecutionProvider"), HostEngines)
    machine |= {"missing": (), "gpus": ()}
    assert isinstance(chosen("CUDAExecutionProvider"), HostEngines)
