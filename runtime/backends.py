"""Backends by name: which of them this machine has, and a bundle's components at work in the one that is right."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import warnings
from typing import TYPE_CHECKING, cast

from ..engines import store
from ..engines.bundle import onnx_data_name
from ..engines.devices import nvidia_gpus
from ..engines.manifest import weights_owner
from ..engines.targets import host_platform, sm_name
from ..engines.tensorrt import MODULES
from ..engines.verified import verify_once
from ..errors import BackendError, InputError, SdrtWarning

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engines.bundle import Bundle
    from ..engines.devices import Gpu
    from ..engines.manifest import Manifest
    from ..engines.tensorrt import BackendName
    from .compile_cache import CompileCache
    from .cuda import Stream
    from .device_workspace import Workspace
    from .openvino import Precision
    from .session import DeviceSession, Engines, Session

AUTO = "auto"
BACKENDS = (AUTO, "onnxruntime", "openvino", "openvino:bf16", "openvino:fp32", *MODULES)
"""What a caller may ask for: ``auto`` for the fastest that is installed; ``openvino`` for bf16 where the CPU has it."""

_ONNX_EXTRAS = {"onnxruntime": "cpu", "openvino": "openvino"}
_X86 = {"x86_64", "amd64"}


def obstacle(bundle: Bundle, backend: str = AUTO) -> str | None:
    """Tell in one line why this machine cannot run a bundle with one of `BACKENDS`; None if it can.

    It reads the manifest and asks the driver for its GPUs, and loads neither engine nor backend: engines for another
    GPU, another version or another platform can crash the process that loads them.

    Raises
    ------
    InputError
        There is no such backend.

    """
    if backend not in BACKENDS:
        raise InputError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)}")
    manifest = bundle.manifest
    if manifest.backend.name in MODULES:
        if backend not in {AUTO, manifest.backend.name}:
            return f"its engines are for {manifest.backend.name}, and {backend} was asked for: leave the backend out"
        return _plan_obstacle(manifest)
    if manifest.backend.name != "onnx":
        known = ", ".join(("onnx", *MODULES))
        return (
            f"its engines are for {manifest.backend.name}, expected one of {known}: build it with this version of sdrt"
        )
    if backend in MODULES:
        return f"it holds graphs, and {backend} runs engines: sdrt build --from {bundle.name} --backend {backend}"
    candidates = tuple(_ONNX_EXTRAS) if backend == AUTO else (backend.partition(":")[0],)
    if not any(map(_installed, candidates)):
        return f"{candidates[0]} is not installed: run pip install 'sdrt[{_ONNX_EXTRAS[candidates[0]]}]'"
    return None


def choose(bundle: Bundle, backend: str = AUTO) -> str:
    """Name the backend that a bundle runs on, with its precision: one of `BACKENDS` that leaves nothing open.

    Raises
    ------
    BackendError
        OpenVINO shall compute in bf16, and this CPU has no instructions for it.

    """
    if bundle.manifest.backend.name in MODULES:
        return bundle.manifest.backend.name
    chosen = (fastest() or "onnxruntime") if backend == AUTO else backend
    if chosen in {"openvino", "openvino:bf16"}:
        from .openvino import default_precision  # noqa: PLC0415 - the backend that is used, and no other

        best = f"openvino:{default_precision()}"
        if chosen not in {"openvino", best}:
            raise BackendError(f"this CPU has no instructions for bf16: take openvino:fp32 instead of {chosen}")
        return best
    return chosen


def fastest() -> str | None:
    """Name what ``auto`` means for graphs here: of the installed backends the fastest that computes exactly, or None.

    With an NVIDIA GPU that is onnxruntime if it can use it, and on x86 processors OpenVINO. In bf16 that is faster
    still, but makes another picture.
    """
    installed = [name for name in _ONNX_EXTRAS if _installed(name)]
    suits = platform.machine().lower() in _X86 and _gpu_of_onnxruntime() is None
    if "openvino" in installed and (suits or "onnxruntime" not in installed):
        return "openvino:fp32"
    return "onnxruntime" if "onnxruntime" in installed else None


def _plan_obstacle(manifest: Manifest) -> str | None:
    backend = manifest.backend
    name = _plan_backend(manifest)
    module, extra = MODULES[name]
    if backend.platform not in {None, host_platform()}:
        return f"its engines are for {backend.platform}, and this is {host_platform()}: {_build(manifest)}"
    for package in (module, "cuda.bindings"):
        if not _installed(package):
            return f"{package} is not installed: run pip install 'sdrt[{extra}]'"
    version = _version(module)
    if version != backend.version:
        return (
            f"its engines are of {name} {backend.version}, and {version} is installed: "
            f"{_build(manifest)}, or pip install {module.replace('_', '-')}=={backend.version}"
        )
    gpus = nvidia_gpus()
    if not gpus:
        return "it needs an NVIDIA GPU, and the CUDA driver shows none: build an ONNX bundle for this machine"
    if _gpu_for(manifest) is None:
        wanted = " or ".join(backend.compute_capabilities)
        found = ", ".join(f"the {gpu.name} has {gpu.compute_capability}" for gpu in gpus)
        return f"its engines are for compute capability {wanted}, and {found}: {_build(manifest, gpus[0])}"
    return None


def _plan_backend(manifest: Manifest) -> BackendName:
    return "tensorrt-rtx" if manifest.backend.name == "tensorrt-rtx" else "tensorrt"


def _build(manifest: Manifest, gpu: Gpu | None = None) -> str:
    """Tell the command that builds a bundle for this machine."""
    gpu = gpu or next(iter(nvidia_gpus()), None)
    target = f" --target {sm_name(gpu.compute_capability)}" if gpu is not None else ""
    return f"build it here with sdrt build --ckpt {manifest.model.source} --backend {manifest.backend.name}{target}"


def _gpu_for(manifest: Manifest) -> Gpu | None:
    """Choose the first GPU that a bundle's engines run on."""
    wanted = manifest.backend.compute_capabilities
    return next((gpu for gpu in nvidia_gpus() if not wanted or gpu.compute_capability in wanted), None)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _version(module: str) -> str:
    """Tell a package's version, without loading its libraries if that can be."""
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(module), "__version__", "unknown"))


def open_engines(bundle: Bundle, backend: str = AUTO) -> Engines:
    """Make a bundle's components ready to be loaded, each when it is first needed.

    With onnxruntime, graphs run on an NVIDIA GPU if there is one that it can use, and on the CPU otherwise. Hide the
    GPUs with ``CUDA_VISIBLE_DEVICES=`` to have the CPU nevertheless.

    Raises
    ------
    InputError
        There is no such backend.
    BackendError, MissingDependencyError
        This machine cannot run them; the message says why.

    """
    if reason := obstacle(bundle, backend):
        raise BackendError(f"{bundle.folder} cannot be run here: {reason}")
    chosen = choose(bundle, backend)
    if chosen in MODULES:
        return _plans_on_gpu(bundle)
    gpu = _gpu_of_onnxruntime()
    if gpu is not None and chosen == "onnxruntime":
        return _onnx_on_gpu(bundle, gpu)
    if gpu is None and backend in {AUTO, "onnxruntime"}:
        _warn_of_idle_gpu()
    from .host import HostEngines  # noqa: PLC0415 - the backend that is used, and no other

    return HostEngines(bundle.manifest, _host_sessions(bundle, chosen))


def _host_sessions(bundle: Bundle, backend: str) -> Callable[[str], Session]:
    """Give what loads a component by its name."""
    if backend == "onnxruntime":
        return lambda name: _onnx_session(bundle, name)
    from .compile_cache import CompileCache  # noqa: PLC0415 - the backend that is used, and no other

    precision = cast("Precision", backend.partition(":")[2])
    cache = CompileCache(bundle, "openvino")
    return lambda name: _openvino_session(bundle, name, precision, cache)


def _onnx_session(bundle: Bundle, name: str) -> Session:
    from .onnx import OnnxSession  # noqa: PLC0415 - the backend that is used, and no other

    component = bundle.component(name)
    verify_once(bundle, name)
    return OnnxSession(bundle.path(bundle.merged_graph(component)), component)


def _openvino_session(bundle: Bundle, name: str, precision: Precision, cache: CompileCache) -> Session:
    from .openvino import OpenVinoSession  # noqa: PLC0415 - the backend that is used, and no other

    component, owner = bundle.component(name), bundle.component(weights_owner(name) or name)
    verify_once(bundle, name)
    # The plain graph: OpenVINO merges attention by itself.
    weights = next((bundle.path(file) for file in owner.files if file.path == onnx_data_name(owner.name)), None)
    return OpenVinoSession(bundle.path(component.graph), weights, component, precision, cache)


def _gpu_of_onnxruntime() -> Gpu | None:
    """Find a GPU for onnxruntime: the first, if its build has CUDA and the driver's bindings are there."""
    return nvidia_gpus()[0] if _onnxruntime_has_cuda() and _installed("cuda.bindings") else None


def _onnxruntime_has_cuda() -> bool:
    if not nvidia_gpus() or not _installed("onnxruntime"):
        return False
    import onnxruntime  # noqa: PLC0415 - 0.1 s that only those with a GPU pay here

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _warn_of_idle_gpu() -> None:
    if _onnxruntime_has_cuda():
        warnings.warn(
            f"running on the CPU, though onnxruntime can use the {nvidia_gpus()[0].name}: cuda-bindings is not "
            "installed, run pip install 'sdrt[gpu]'",
            SdrtWarning,
            stacklevel=3,
        )


def _onnx_on_gpu(bundle: Bundle, gpu: Gpu) -> Engines:
    from .cuda import Device  # noqa: PLC0415 - the backend that is used, and no other
    from .device_engines import DeviceEngines  # noqa: PLC0415
    from .device_onnx import OnnxCudaSession  # noqa: PLC0415

    device = Device(gpu.index)

    def open_session(name: str, stream: Stream, _workspace: Workspace) -> DeviceSession:
        component = bundle.component(name)
        verify_once(bundle, name)
        return OnnxCudaSession(device, stream, bundle.path(bundle.merged_graph(component)), component)

    return DeviceEngines(bundle.manifest, device, open_session)


def _plans_on_gpu(bundle: Bundle) -> Engines:
    from .cuda import Device  # noqa: PLC0415 - the backend that is used, and no other
    from .device_engines import DeviceEngines  # noqa: PLC0415
    from .tensorrt import TensorRTSession  # noqa: PLC0415

    gpu = _gpu_for(bundle.manifest)
    assert gpu is not None  # else there were an obstacle
    device = Device(gpu.index)

    def open_session(name: str, stream: Stream, workspace: Workspace) -> DeviceSession:
        component = bundle.component(name)
        verify_once(bundle, name)
        kept = f"{component.name}-{component.graph.sha256[:16]}-{re.sub(r'[^A-Za-z0-9]+', '-', gpu.name)}.cache"
        return TensorRTSession(
            device,
            stream,
            workspace=workspace,
            backend=_plan_backend(bundle.manifest),
            plan=bundle.path(component.graph),
            component=component,
            cache=store.home() / "compiled" / kept,
        )

    return DeviceEngines(bundle.manifest, device, open_session)
