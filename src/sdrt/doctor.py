"""`sdrt doctor`: what this machine can run, and what to install for more."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

from ._version import __version__
from .engines.devices import nvidia_gpus
from .engines.store import home
from .engines.table import columns
from .engines.targets import sm_name
from .engines.tensorrt import supported_capabilities
from .runtime.backends import fastest
from .runtime.kernels import kernels
from .runtime.openvino import default_precision

if TYPE_CHECKING:
    from collections.abc import Callable


class _Part(NamedTuple):
    """Something that can be installed: a backend, or the building of bundles."""

    name: str
    module: str
    packages: tuple[str, ...]
    extra: str
    use: str
    devices: Callable[[], list[str]]


def _onnxruntime_devices() -> list[str]:
    import onnxruntime  # noqa: PLC0415

    # Every build also lists Azure, which is a service and no device.
    names = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return [name for name in names if name != "Azure"]


def _cpu() -> list[str]:
    return ["CPU"]


def _openvino_devices() -> list[str]:
    if default_precision() != "bf16":
        return ["CPU in fp32"]
    return ["CPU in bf16 and fp32", *(["own kernels on AMX"] if kernels() else [])]


def _rtx_targets() -> list[str]:
    return [f"for {', '.join(map(sm_name, supported_capabilities('tensorrt-rtx')))}"]


def _gpus() -> list[str]:
    return [gpu.name for gpu in nvidia_gpus()]


_PARTS = (
    _Part(
        "onnxruntime",
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu"),
        "cpu",
        "run ONNX bundles, on the CPU",
        _onnxruntime_devices,
    ),
    _Part("openvino", "openvino", ("openvino",), "openvino", "run ONNX bundles, on the CPU", _openvino_devices),
    _Part("export", "torch", ("torch",), "export", "build bundles from checkpoints", _cpu),
    _Part(
        "tensorrt-rtx",
        "tensorrt_rtx",
        ("tensorrt-rtx", "tensorrt_rtx"),
        "rtx",
        "build engines for RTX GPUs, with or without one, and run them on one",
        _rtx_targets,
    ),
    _Part(
        "tensorrt",
        "tensorrt",
        ("tensorrt",),
        "trt",
        "build engines for the NVIDIA GPU of this machine, and run them",
        _gpus,
    ),
)


def examine() -> dict[str, Any]:
    """Look at this machine.

    Returns
    -------
    dict
        ``sdrt``, ``python``, ``platform``, ``cpus``, ``memory`` and ``disk_free`` in bytes, ``gpus``, ``home``,
        ``backend``, which is what ``auto`` means here for ONNX bundles or None, and ``parts``: for each its use,
        whether it is installed, its version, its devices, and what to install.

    """
    place = home()
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    return {
        "sdrt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "home": str(place),
        "disk_free": shutil.disk_usage(existing).free,
        "gpus": [dataclasses.asdict(gpu) for gpu in nvidia_gpus()],
        "backend": fastest(),
        "parts": {part.name: _examine_part(part) for part in _PARTS},
    }


def _examine_part(part: _Part) -> dict[str, Any]:
    facts: dict[str, Any] = {"use": part.use, "installed": False, "version": None, "devices": [], "problem": None}
    if importlib.util.find_spec(part.module) is None:
        return facts | {"install": f"pip install 'sdrt[{part.extra}]'"}
    facts |= {"installed": True, "version": _version(part.packages), "install": None}
    try:
        importlib.import_module(part.module)
        facts["devices"] = part.devices()
    except Exception as error:  # noqa: BLE001 - a broken package is what the doctor is asked about
        facts["problem"] = f"{part.module} is installed and does not load: {error}"
    return facts


def _version(packages: tuple[str, ...]) -> str | None:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def table(facts: dict[str, Any]) -> str:
    """Lay out what `examine` found."""
    memory = f"{facts['memory'] / 1e9:.1f} GB" if facts["memory"] else "unknown"
    gpus = ", ".join(f"{gpu['name']} (compute capability {gpu['compute_capability']})" for gpu in facts["gpus"])
    machine = columns(
        [
            ("sdrt", f"{facts['sdrt']}, Python {facts['python']}"),
            ("platform", facts["platform"]),
            ("processors", f"{facts['cpus']}, {memory} of memory"),
            ("NVIDIA GPUs", gpus or "none"),
            ("ONNX bundles", f"run on {facts['backend']}" if facts["backend"] else "do not run: install a backend"),
            ("home", f"{facts['home']} ({facts['disk_free'] / 1e9:.1f} GB free)"),
        ]
    )
    rows = [("PART", "FOR", "INSTALLED", "DEVICES", "TO DO")]
    rows += [
        (
            name,
            part["use"],
            part["version"] or ("yes" if part["installed"] else "no"),
            ", ".join(part["devices"]),
            part["problem"] or part["install"] or "",
        )
        for name, part in facts["parts"].items()
    ]
    return f"{machine}\n\n{columns(rows)}"
