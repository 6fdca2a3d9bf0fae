"""Arrays on the GPU and how others take them, over a STAND-IN for the driver; the capsules are real (DLPack's)."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch.utils.dlpack

from sdrt.errors import DeviceMemoryError, InputError
from sdrt.runtime import device_array
from sdrt.runtime.cuda import Device, Stream
from sdrt.runtime.device_array import DeviceArray, foreign

from .driver_stand_in import DriverStandIn, garbage_collected, nothing_left

if TYPE_CHECKING:
    from collections.abc import Iterator

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.fixture
def driver() -> Iterator[DriverStandIn]:
    stand_in = DriverStandIn()
    with nothing_left(stand_in):
        yield stand_in
    assert device_array._handed_out == {}


@pytest.fixture
def device(driver: DriverStandIn) -> Iterator[Device]:
    with Device(0, driver) as opened, opened.current():
        yield opened


def make(device: Device, driver: DriverStandIn) -> DeviceArray:
    array = DeviceArray(device, VALUES.shape)
    driver.floats(array.pointer, VALUES.size)[...] = VALUES.reshape(-1)
    return array


class OnHost:
    """Passes an array's capsule off as one of the host's memory, which the stand-in's is, to numpy and torch."""

    def __init__(self, array: DeviceArray) -> None:
        self.array = array
        self.streams: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        self.streams.append(stream)
        capsule = self.array.__dlpack__(stream=-1)
        pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )
        managed = device_array._Managed.from_address(pointer_of(capsule, b"dltensor"))
        assert managed.tensor.device_type == 2
        managed.tensor.device_type = 1
        return capsule


def test_stand_in_array_goes_to_the_host(device: Device, driver: DriverStandIn) -> None:
    array = make(device, driver)
    np.testing.assert_array_equal(array.numpy(), VALUES)
    assert array.nbytes == 96


@pytest.mark.parametrize("take", [np.from_dlpack, torch.utils.dlpack.from_dlpack], ids=["numpy", "torch"])
def test_stand_in_array_is_taken_through_dlpack_without_a_copy(
    device: Device, driver: DriverStandIn, take: Any
) -> None:
    array = make(device, driver)
    taken = take(OnHost(array))
    assert tuple(taken.shape) == VALUES.shape
    np.testing.assert_array_equal(np.asarray(taken), VALUES)
    driver.floats(array.pointer, 1)[0] = 7
    assert float(taken[0, 0, 0]) == 7, "it is the same memory"
    del array
    assert driver.live["memory"], "the consumer keeps it"
    with garbage_collected():
        del taken
    assert not driver.live["memory"]


def test_stand_in_capsule_that_nobody_takes_frees_the_array(device: Device, driver: DriverStandIn) -> None:
    capsule = make(device, driver).__dlpack__()
    assert driver.live["memory"]
    del capsule
    assert not driver.live["memory"]


def test_stand_in_consumers_stream_waits_on_the_gpu(device: Device, driver: DriverStandIn) -> None:
    with Stream(device) as ours, Stream(device) as theirs:
        array = make(device, driver).written_by(ours)
        array.__dlpack__(stream=theirs.pointer)
        array.__dlpack__()
        assert driver.count("cuStreamWaitEvent") == 2
        array.__dlpack__(stream=-1)
        assert driver.count("cuStreamWaitEvent") == 2
        assert driver.count("cuStreamSynchronize", "cuEventSynchronize") == 0


@pytest.mark.parametrize("options", [{"copy": True}, {"dl_device": (1, 0)}])
def test_stand_in_array_is_not_copied_on_demand(device: Device, driver: DriverStandIn, options: dict[str, Any]) -> None:
    with pytest.raises(BufferError):
        make(device, driver).__dlpack__(**options)
    assert make(device, driver).__dlpack_device__() == (2, 0)


def test_stand_in_interface_names_the_stream_while_it_is_there(device: Device, driver: DriverStandIn) -> None:
    with Stream(device) as stream:
        array = make(device, driver).written_by(stream)
        facts = array.__cuda_array_interface__
        assert facts == {
            "version": 3,
            "shape": (2, 3, 4),
            "typestr": "<f4",
            "data": (array.pointer, False),
            "strides": None,
            "stream": stream.pointer,
        }
        assert foreign("image", array, (2, 3, 4)) == (array.pointer, stream.pointer)
    assert array.__cuda_array_interface__["stream"] is None


def test_stand_in_array_outlives_its_device(driver: DriverStandIn) -> None:
    with Device(0, driver) as device, device.current():
        array = make(device, driver)
    assert driver.retained == 1
    np.testing.assert_array_equal(array.numpy(), VALUES)
    array.close()
    assert driver.retained == 0


def test_stand_in_array_too_large_leaves_nothing(device: Device, driver: DriverStandIn) -> None:
    with pytest.raises(DeviceMemoryError, match="the images: "):
        DeviceArray(device, (driver.total,), purpose="the images")


class Theirs:
    def __init__(self, **facts: Any) -> None:
        self.__cuda_array_interface__ = {"shape": (2, 3), "typestr": "<f4", "data": (4096, False), "version": 3} | facts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 3), np.float32), "the latents is ndarray: expected an array with __cuda_array_interface__"),
        (Theirs(shape=(3, 2)), r"the latents has the shape \(3, 2\): expected \(2, 3\)"),
        (Theirs(typestr="<f2"), "the latents is of type <f2: expected float32"),
        (Theirs(strides=(4, 8)), r"the latents has the strides \(4, 8\): expected an array in C order"),
    ],
)
def test_arrays_that_cannot_be_taken_are_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        foreign("the latents", given, (2, 3))


def test_arrays_of_others_are_taken_where_they_are() -> None:
    assert foreign("the latents", Theirs(strides=(12, 4), stream=9), (2, 3)) == (4096, 9)
    assert foreign("the latents", Theirs(), (2, 3)) == (4096, None)
