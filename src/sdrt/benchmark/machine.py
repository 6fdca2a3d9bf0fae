"""What a measurement was made on, and what is left of its memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any, Final

from .._version import __version__

_PACKAGES: Final = ("numpy", "onnxruntime", "openvino", "torch", "diffusers", "transformers")
_BF16_FLAGS: Final = ("avx512_bf16", "amx_bf16", "bf16")


def describe() -> dict[str, Any]:
    """Tell the processor, how many of its cores we may use, the memory in GB, the load, and the versions."""
    facts = _processor()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "bf16": sorted(flags.intersection(_BF16_FLAGS)),
        "cores": cores(),
        "memory_gb": _gigabytes(_meminfo("MemTotal")),
        "available_gb": _gigabytes(available_memory()),
        "load_average": load_average(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {"sdrt": __version__} | {package: _version(package) for package in _PACKAGES},
    }


def cores() -> int:
    """Tell how many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> list[float] | None:
    """Tell how many processes ran, or wanted to, over the last 1, 5 and 15 minutes; None where nobody counts."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def available_memory() -> int | None:
    """Tell how many bytes can still be taken without swapping; None where the system does not say."""
    return _meminfo("MemAvailable")


def peak_memory() -> int | None:
    """Tell the most bytes this process has had in memory, mapped files counted; None where nobody counts."""
    try:
        import resource  # noqa: PLC0415 - Windows has none
    except ImportError:
        return None
    return resident_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def resident_bytes(maxrss: int) -> int:
    """Turn the system's unit of a peak into bytes."""
    return maxrss if sys.platform == "darwin" else 1024 * maxrss


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def _processor() -> dict[str, str]:
    """Read what Linux tells of the first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n", maxsplit=1)[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _gigabytes(count: int | None) -> float | None:
    return None if count is None else round(count / 1e9, 2)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
