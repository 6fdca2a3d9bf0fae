"""The NVIDIA GPUs of this machine, asked of the driver itself: no package needed, nothing loaded without one."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute in cuda.h


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU: its marketing name, compute capability such as ``8.6``, and memory in bytes."""

    index: int
    name: str
    compute_capability: str
    memory: int


@functools.cache
def nvidia_gpus() -> tuple[Gpu, ...]:
    """List the GPUs that the CUDA driver shows; empty without a driver. ``CUDA_VISIBLE_DEVICES`` is honoured."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_describe(driver, index) for index in range(count.value))


def _describe(driver: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(index, name.value.decode(errors="replace"), f"{major.value}.{minor.value}", memory.value)
