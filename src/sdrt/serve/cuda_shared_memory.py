"""Memory of an NVIDIA GPU that another process has allocated and shares with the server, through CUDA's IPC handles."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, MissingDependencyError
from ..runtime.cuda import Device
from .shared_memory import Region, RegionError

if TYPE_CHECKING:
    from .shared_memory import Regions

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag that cuIpcOpenMemHandle knows


@dataclass(frozen=True, eq=False)
class CudaRegion(Region):
    """An allocation of another process, unmapped here when nothing refers to it any more.

    Attributes
    ----------
    name
        Under which it is registered.
    device_id
        The GPU, as CUDA counts.
    byte_size
        How large it is.
    device
        Its context.
    pointer
        Where it is mapped.

    """

    name: str
    device_id: int
    byte_size: int
    device: Device
    pointer: int

    def __post_init__(self) -> None:
        weakref.finalize(self, _unmap, self.device, self.pointer)

    def read(self, offset: int, byte_size: int) -> bytes:
        """Give a copy of a part of it, which lies within it.

        Raises
        ------
        RegionError
            It is not there any more.

        """
        content = bytearray(byte_size)
        self._copy("cuMemcpyDtoH", _address(content), self.pointer + offset, byte_size)
        return bytes(content)

    def write(self, offset: int, content: bytes | memoryview) -> None:
        """Put bytes into it; they fit.

        Raises
        ------
        RegionError
            It is not there any more.

        """
        copy = bytearray(content)
        self._copy("cuMemcpyHtoD", self.pointer + offset, _address(copy), len(copy))

    def _copy(self, how: str, target: int, source: int, byte_size: int) -> None:
        if not byte_size:
            return
        try:
            with self.device.current():
                self.device.call(how, target, source, byte_size)
        except BackendError as error:
            raise RegionError(f"CUDA shared memory region {self.name[:100]!r} cannot be used: {error}") from None


def register(
    regions: Regions, name: str, handle: bytes, *, device_id: int, byte_size: int, driver: Any = None
) -> CudaRegion:
    """Register memory of a GPU.

    Parameters
    ----------
    regions
        Where.
    name
        How it is called from now on.
    handle
        As ``cudaIpcGetMemHandle`` gives it to the process that has allocated the memory.
    device_id
        The GPU, as CUDA counts.
    byte_size
        How large the region is.
    driver
        ``cuda.bindings.driver``, or what stands in for it.

    Raises
    ------
    RegionError
        There is no such GPU, the handle is none, or its memory is smaller than that.

    """
    return regions.add(name, lambda: _open(name, handle, device_id, byte_size, driver))


def _open(name: str, handle: bytes, device_id: int, byte_size: int, driver: Any) -> CudaRegion:
    if len(handle) != _HANDLE_BYTES:
        raise RegionError(f"the CUDA IPC handle has {len(handle)} bytes: expected {_HANDLE_BYTES}")
    if not 0 <= device_id < 1 << 31:
        raise RegionError(f"the GPU's number is {device_id}: expected one from 0 on")
    try:
        device = Device(device_id, driver)
    except (BackendError, MissingDependencyError) as error:
        raise RegionError(f"CUDA shared memory region {name[:100]!r} cannot be registered: {error}") from None
    try:
        with device.current():
            given = device.driver.CUipcMemHandle()
            ctypes.memmove(given.getPtr(), handle, _HANDLE_BYTES)
            pointer = int(device.call("cuIpcOpenMemHandle", given, _LAZY_PEER_ACCESS))
            region = CudaRegion(name, device_id, byte_size, device.retain(), pointer)
            # What lies behind it may be this process' own.
            base, size = device.call("cuMemGetAddressRange", pointer)
    except BackendError as error:
        raise RegionError(f"CUDA shared memory region {name[:100]!r} cannot be registered: {error}") from None
    finally:
        device.close()
    there = int(base) + int(size) - pointer
    if not 1 <= byte_size <= there:
        raise RegionError(
            f"CUDA shared memory region {name[:100]!r} is to have {byte_size} bytes: expected at least 1 of the "
            f"{there} that were allocated"
        )
    return region


def _unmap(device: Device, pointer: int) -> None:
    try:
        with device.current():
            device.call("cuIpcCloseMemHandle", pointer)
    finally:
        device.release()


def _address(content: bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * len(content)).from_buffer(content))
