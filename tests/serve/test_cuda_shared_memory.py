"""Memory of a GPU that another process shares: over a STAND-IN for the driver, and, marked ``gpu``, in earnest."""

# ruff: noqa: N802 - the functions have the driver's names

from __future__ import annotations

import ctypes
import gc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.http as triton

from sdrt.serve import cuda_shared_memory
from sdrt.serve.cuda_shared_memory import CudaRegion
from sdrt.serve.shared_memory import RegionError, RegionExistsError, RegionMissingError, Regions

from ..runtime.driver_stand_in import OK, CUresult, DriverStandIn, nothing_left
from .test_oip_http import drawn, inputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sdrt

    from .server import Server

HANDLE = bytes(range(64))
PIXELS = 128 * 128 * 3


class MemHandle:
    """``CUipcMemHandle``: 64 bytes at an address."""

    def __init__(self) -> None:
        self.content = ctypes.create_string_buffer(64)

    def getPtr(self) -> int:
        return ctypes.addressof(self.content)


class SharingStandIn(DriverStandIn):
    """A driver with 100 bytes that another process has allocated and shares under `HANDLE`."""

    def __init__(self) -> None:
        super().__init__()
        self.CUipcMemHandle = MemHandle
        self.theirs = np.arange(100, dtype=np.uint8)
        self.live["mapped"] = {}

    def cuIpcOpenMemHandle(self, handle: MemHandle, flags: int) -> tuple[CUresult, int] | CUresult:
        assert flags == 1
        if handle.content.raw != HANDLE:
            return CUresult.CUDA_ERROR_INVALID_VALUE
        self.live["mapped"][self.theirs.ctypes.data] = True
        return OK, self.theirs.ctypes.data

    def cuIpcCloseMemHandle(self, pointer: int) -> CUresult:
        return self._drop("mapped", pointer)

    def cuMemGetAddressRange(self, pointer: int) -> tuple[CUresult, int, int]:
        assert pointer == self.theirs.ctypes.data
        return OK, pointer, self.theirs.nbytes

    def cuMemcpyHtoD(self, target: int, source: int, size: int) -> CUresult:
        self._check(target, size)
        self._copy(target, source, size)
        return OK

    def cuMemcpyDtoH(self, target: int, source: int, size: int) -> CUresult:
        self._check(source, size)
        self._copy(target, source, size)
        return OK

    def _check(self, pointer: int, size: int) -> None:
        start = self.theirs.ctypes.data
        assert start <= pointer <= pointer + size <= start + self.theirs.nbytes


@pytest.fixture
def driver() -> Iterator[SharingStandIn]:
    stand_in = SharingStandIn()
    with nothing_left(stand_in):
        yield stand_in
        gc.collect()


def register(regions: Regions, driver: Any, name: str = "gpu", handle: bytes = HANDLE, **more: int) -> CudaRegion:
    given = {"device_id": 0, "byte_size": 80, **more}
    return cuda_shared_memory.register(regions, name, handle, **given, driver=driver)


def test_stand_in_is_read_and_written(driver: SharingStandIn) -> None:
    regions = Regions(allowed=True)
    register(regions, driver)
    view = regions.view("gpu", 10, 5)
    assert view.read() == bytes([10, 11, 12, 13, 14])
    view.write(memoryview(b"here"))
    assert driver.theirs[9:16].tolist() == [9, *b"here", 14, 15]
    assert regions.view("gpu", 80, 0).read() == b""
    with pytest.raises(RegionError, match="expected a part of its 80 bytes"):
        regions.view("gpu", 79, 2)
    regions.unregister(None)
    assert len(regions.status(None, CudaRegion)) == 1, "the other kind was meant"
    regions.unregister("gpu", CudaRegion)
    view.write(b"late")
    assert driver.left() == {"mapped": 1, "context": 1}, "as long as somebody writes there"


def test_stand_in_names_are_shared_with_the_other_kind(driver: SharingStandIn) -> None:
    regions = Regions(allowed=True)
    register(regions, driver)
    with pytest.raises(RegionExistsError):
        register(regions, driver)
    with pytest.raises(RegionMissingError, match="is of another kind"):
        regions.status("gpu")
    assert [region.byte_size for region in regions.status("gpu", CudaRegion)] == [80]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"handle": b"short"}, "the CUDA IPC handle has 5 bytes: expected 64"),
        ({"handle": bytes(64)}, "'gpu' cannot be registered: CUDA failed in cuIpcOpenMemHandle"),
        ({"device_id": 1}, "'gpu' cannot be registered: CUDA failed in cuDeviceGet"),
        ({"device_id": -1}, "the GPU's number is -1"),
        ({"byte_size": 101}, "is to have 101 bytes: expected at least 1 of the 100 that were allocated"),
        ({"byte_size": 0}, "is to have 0 bytes"),
    ],
    ids=str,
)
def test_stand_in_mistakes_leave_nothing_mapped(driver: SharingStandIn, wrong: dict[str, Any], message: str) -> None:
    regions = Regions(allowed=True)
    with pytest.raises(RegionError, match=message):
        register(regions, driver, **wrong)
    gc.collect()
    assert driver.left() == {}
    assert regions.status(None, CudaRegion) == []


def test_stand_in_failing_copies_are_told(driver: SharingStandIn) -> None:
    regions = Regions(allowed=True)
    register(regions, driver)
    view = regions.view("gpu", 0, 4)
    for use in ("read", "write"):
        driver.fail_at = len(driver.calls) + 1  # the context comes first
        with pytest.raises(RegionError, match="'gpu' cannot be used: CUDA failed in cuMemcpy"):
            view.read() if use == "read" else view.write(b"x")


@pytest.mark.gpu
def test_pixels_arrive_on_the_gpu(inference_server: Server, pipe: sdrt.Pipeline) -> None:
    from tritonclient.utils import cuda_shared_memory as theirs

    handle = theirs.create_shared_memory_region("gpu", PIXELS, 0)
    with triton.InferenceServerClient(inference_server.url.removeprefix("http://")) as client:
        client.register_cuda_shared_memory("gpu", theirs.get_raw_handle(handle), 0, PIXELS)
        image = triton.InferRequestedOutput("image")
        image.set_shared_memory("gpu", PIXELS)
        client.infer("demo", inputs(triton), outputs=[image])
        pixels = theirs.get_contents_as_numpy(handle, np.uint8, [1, 128, 128, 3])
        np.testing.assert_array_equal(pixels, drawn(pipe)[None])
        client.unregister_cuda_shared_memory("gpu")
    theirs.destroy_shared_memory_region(handle)
