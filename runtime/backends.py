"""Backends by name: which of them this machine has, and a bundle's components at work in the one that is right."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import warnings
from typing import TYPE_CHECKING

from ..engines import store
from ..engines.devices import nvidia_gpus
from ..engines.targets import host_platform, sm_name
from ..engines.tensorrt import MODULES
from ..engines.verified import verify_once
from ..errors import BackendError, SdrtWarning

if TYPE_CHECKING:
    from ..engines.bundle import Bundle
    from ..engines.devices import Gpu
    from ..engines.manifest import Manifest
    from ..engines.tensorrt import BackendName
    from .cuda import Stream
    from .device_workspace import Workspace
    from .session import DeviceSession, Engines, Session


def obstacle(bundle: Bundle) -> str | None:
    """Tell in one line why this machine cannot run a bundle; None if it can.

    It reads the manifest and asks the driver for its GPUs, and loads neither engine nor backend: engines for another
    GPU, another version or another platform can crash the process that loads them.
    """
    manifest = bundle.manifest
    if manifest.backend.name in MODULES:
        return _plan_obstacle(manifest)
    if manifest.backend.name != "onnx":
        known = ", ".join(("onnx", *MODULES))
        return (
            f"its engines are for {manifest.backend.name}, expected one of {known}: build it with this version of sdrt"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: run pip install 'sdrt[cpu]'"
    return None


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


def open_engines(bundle: Bundle) -> Engines:
    """Make a bundle's components ready to be loaded, each when it is first needed.

    ONNX graphs run on an NVIDIA GPU if there is one that onnxruntime can use, and on the CPU otherwise. Hide the GPUs
    with ``CUDA_VISIBLE_DEVICES=`` to have the CPU nevertheless.

    Raises
    ------
    BackendError, MissingDependencyError
        This machine cannot run them; the message says why.

    """
    if reason := obstacle(bundle):
        raise BackendError(f"{bundle.folder} cannot be run here: {reason}")
    if bundle.manifest.backend.name in MODULES:
        return _plans_on_gpu(bundle)
    if (gpu := _gpu_of_onnxruntime()) is not None:
        return _onnx_on_gpu(bundle, gpu)
    from .host import HostEngines  # noqa: PLC0415 - the backend that is used, and no other

    return HostEngines(bundle.manifest, lambda name: _onnx_session(bundle, name))


def _onnx_session(bundle: Bundle, name: str) -> Session:
    from .onnx import OnnxSession  # noqa: PLC0415 - the backend that is used, and no other

    component = bundle.component(name)
    verify_once(bundle, name)
    return OnnxSession(bundle.path(bundle.merged_graph(component)), component)


def _gpu_of_onnxruntime() -> Gpu | None:
    """Find a GPU for onnxruntime: the first, if its build has CUDA."""
    gpus = nvidia_gpus()
    if not gpus:
        return None
    import onnxruntime  # noqa: PLC0415 - 0.1 s that only those with a GPU pay here

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return None
    if not _installed("cuda.bindings"):
        warnings.warn(
            f"running on the CPU, though onnxruntime can use the {gpus[0].name}: cuda-bindings is not installed, "
            "run pip install 'sdrt[gpu]'",
            SdrtWarning,
            stacklevel=2,
        )
        return None
    return gpus[0]


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
