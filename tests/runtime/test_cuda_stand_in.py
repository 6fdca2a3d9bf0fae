"""`sdrt.runtime.cuda` over a STAND-IN for the driver; see `driver_stand_in`. No GPU is involved."""

from __future__ import annotations

import ctypes
import inspect
import re
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.errors import BackendError, DeviceMemoryError
from sdrt.runtime import cuda
from sdrt.runtime.cuda import Buffer, Device, Event, Kernel, PinnedBuffer, Stream
from sdrt.runtime.device_kernel import NAME
from sdrt.runtime.device_ptx import PTX

from . import driver_stand_in
from .driver_stand_in import CUresult, DriverStandIn, nothing_left

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def driver() -> Iterator[DriverStandIn]:
    stand_in = DriverStandIn()
    with nothing_left(stand_in):
        yield stand_in


@pytest.fixture
def device(driver: DriverStandIn) -> Iterator[Device]:
    with Device(0, driver) as opened, opened.current():
        yield opened


def upload(stream: Stream, pinned: PinnedBuffer, target: Buffer, values: Any) -> None:
    data = np.asarray(values, np.float32)
    pinned.view[: data.nbytes] = data.reshape(-1).view(np.uint8).data
    stream.copy_in(target.pointer, pinned.pointer, data.nbytes)


def test_stand_in_copies_go_through_a_stream_in_order(device: Device, driver: DriverStandIn) -> None:
    with (
        Stream(device) as stream,
        PinnedBuffer(device, 16) as pinned,
        Buffer(device, 16) as first,
        Buffer(device, 16) as second,
    ):
        upload(stream, pinned, first, [1, 2, 3, 4])
        stream.copy(second.pointer, first.pointer, 16)
        assert driver.floats(second.pointer, 4)[0] != 1, "nothing runs before it is waited for"
        stream.synchronize()
        assert driver.floats(second.pointer, 4).tolist() == [1, 2, 3, 4]
        assert first.pointer % 256 == second.pointer % 256 == 0


def test_stand_in_garbage_may_be_freed_in_the_middle_of_what_a_stream_does(
    device: Device, driver: DriverStandIn
) -> None:
    done: list[str] = []
    with Stream(device) as stream:
        garbage = Buffer(device, 16)

        def collect() -> None:
            garbage.close()
            done.append("first")

        driver.enqueue(stream.pointer, collect)
        driver.enqueue(stream.pointer, lambda: done.append("second"))
        stream.synchronize()
        assert done == ["first", "second"]
        driver.enqueue(stream.pointer, lambda: done.append("third"))
        stream.synchronize()
        assert done[2:] == ["third"]


def test_stand_in_work_that_fails_is_done_with(device: Device, driver: DriverStandIn) -> None:
    with Stream(device) as stream:
        driver.enqueue(stream.pointer, list[None]().pop)
        with pytest.raises(IndexError, match="empty list"):
            stream.synchronize()
        stream.synchronize()


def test_stand_in_capture_records_and_a_launch_replays(device: Device, driver: DriverStandIn) -> None:
    done: list[int] = []
    with Stream(device) as stream:
        with stream.capture(lambda: driver.enqueue(stream.pointer, lambda: done.append(len(done)))) as graph:
            stream.synchronize()
            assert done == []
            graph.launch(stream)
            graph.launch(stream)
            stream.synchronize()
        assert done == [0, 1]
    assert driver.count("cuGraphInstantiate") == driver.count("cuGraphExecDestroy") == 1


def test_stand_in_capture_that_is_broken_ends_and_leaves_nothing(device: Device) -> None:
    with Stream(device) as stream:
        with pytest.raises(BackendError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
            stream.capture(stream.synchronize)
        stream.synchronize()  # the stream works again

        def fails() -> None:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            stream.capture(fails)


def test_stand_in_events_order_streams_and_measure(device: Device, driver: DriverStandIn) -> None:
    order: list[str] = []
    with Stream(device) as ours, Stream(device) as theirs, Event(device) as began, Event(device) as ended:
        ours.record(began)
        driver.enqueue(ours.pointer, lambda: order.append("ours"))
        ours.record(ended)
        theirs.wait(ended)
        driver.enqueue(theirs.pointer, lambda: order.append("theirs"))
        theirs.synchronize()
        assert order == ["ours", "theirs"]
        assert ended.seconds_since(began) >= 0


def test_stand_in_callers_stream_comes_before_and_after(device: Device, driver: DriverStandIn) -> None:
    order: list[str] = []
    with Stream(device) as ours, Stream(device) as theirs:
        driver.enqueue(theirs.pointer, lambda: order.append("before"))
        with ours.joined([theirs.pointer]):
            driver.enqueue(ours.pointer, lambda: order.append("within"))
        driver.enqueue(theirs.pointer, lambda: order.append("after"))
        theirs.synchronize()
        assert order == ["before", "within", "after"]
        with ours.joined([]):
            pass
        assert driver.count("cuStreamSynchronize") == 1


def test_stand_in_memory_that_is_not_there_is_told_in_bytes(device: Device, driver: DriverStandIn) -> None:
    free = driver.total
    with pytest.raises(DeviceMemoryError) as error:
        Buffer(device, free + 1, "the activations")
    assert (error.value.asked, error.value.free) == (free + 1, free)
    assert str(error.value).startswith(
        f"the activations: {free + 1} bytes of GPU memory are needed and {free} are free: "
    )
    assert isinstance(error.value, MemoryError)
    with pytest.raises(DeviceMemoryError, match="the engine: "):
        device.require(free + 1, "the engine")
    with Buffer(device, free):
        pass


@pytest.mark.parametrize("code", [code for code in CUresult if code != 0])
def test_stand_in_every_code_becomes_an_error_with_its_name(device: Device, driver: DriverStandIn, code: Any) -> None:
    driver.fail_at, driver.fail_with = len(driver.calls), code
    with pytest.raises(BackendError) as error:
        device.memory()
    out_of_memory = code == CUresult.CUDA_ERROR_OUT_OF_MEMORY
    assert isinstance(error.value, DeviceMemoryError) == out_of_memory
    assert out_of_memory or str(error.value).startswith(f"CUDA failed in cuMemGetInfo: {code.name} (")
    assert "\n" not in str(error.value)


def everything(driver: DriverStandIn) -> None:
    """Make one of everything, and use it."""
    with (
        Device(0, driver) as device,
        device.current(),
        Stream(device) as stream,
        Stream(device) as theirs,
        PinnedBuffer(device, 64) as pinned,
        Buffer(device, 64) as buffer,
        Event(device) as event,
        Kernel(device, PTX, NAME) as kernel,
        stream.joined([theirs.pointer]),
        stream.capture(lambda: stream.copy_in(buffer.pointer, pinned.pointer, 64)) as graph,
    ):
        graph.launch(stream)
        stream.record(event)
        event.wait()
        numbers = (0,) * 8
        kernel.launch(stream, 1, 256, numbers, (ctypes.c_void_p,) * 6 + (ctypes.c_uint,) * 2)
        stream.copy(buffer.pointer, buffer.pointer, 64)
        stream.copy_out(pinned.pointer, buffer.pointer, 64)
        stream.synchronize()


def test_stand_in_any_call_may_fail_and_nothing_is_left() -> None:
    whole = DriverStandIn()
    everything(whole)
    assert whole.left() == {}
    for number, name in enumerate(whole.calls):
        driver = DriverStandIn()
        driver.fail_at = number
        with pytest.raises(BackendError, match="CUDA_ERROR_LAUNCH_FAILED"):
            everything(driver)
        assert driver.left() == {}, f"call {number}, {name}"


def test_stand_in_contexts_are_one_for_each_thread(device: Device) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with pytest.raises(BackendError, match="CUDA_ERROR_INVALID_CONTEXT"):
                device.memory()
            with device.current():
                device.memory()
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_stand_in_closing_twice_frees_once(device: Device, driver: DriverStandIn) -> None:
    buffer = Buffer(device, 8)
    buffer.close()
    buffer.close()
    assert driver.count("cuMemFree") == 1


def test_stand_in_context_outlives_its_maker_as_long_as_it_is_retained(driver: DriverStandIn) -> None:
    device = Device(0, driver)
    device.retain()
    device.close()
    assert driver.retained == 1
    device.release()
    assert driver.retained == 0


def test_a_machine_without_a_driver_is_told_so() -> None:
    bindings = pytest.importorskip("cuda.bindings.driver")
    try:
        bindings.cuInit(0)
    except RuntimeError:
        with pytest.raises(BackendError, match="the NVIDIA driver cannot do cuInit"):
            Device()
    else:
        pytest.skip("there is a driver here")


def test_every_function_that_is_called_is_in_the_real_bindings_and_in_the_stand_in() -> None:
    bindings = pytest.importorskip("cuda.bindings.driver")
    text = inspect.getsource(cuda)
    names = set(re.findall(r'"(cu[A-Z]\w+)"', text)) | set(re.findall(r"driver\.(cu[A-Z]\w+)", text))
    assert len(names) > 25
    for name in sorted(names):
        real = getattr(bindings, name)
        # The first line of its documentation is its signature.
        parameters = re.match(rf"{name}\((.*?)\)", real.__doc__.replace("\n", " ")).group(1)  # type: ignore[union-attr]
        count = len([part for part in parameters.split(",") if part.strip()])
        stand_in = inspect.signature(object.__getattribute__(DriverStandIn(), name))
        assert len(stand_in.parameters) == count, name


def test_the_real_bindings_take_the_arguments_of_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = pytest.importorskip("cuda.bindings.driver")
    try:
        bindings.cuInit(0)
    except RuntimeError as error:
        absent = type(error)
    else:
        pytest.skip("there is a driver here: the tests marked gpu call it")
    made: list[tuple[str, tuple[Any, ...]]] = []
    real = Device.call

    def call(self: Device, name: str, *arguments: Any) -> Any:
        made.append((name, arguments))
        return real(self, name, *arguments)

    monkeypatch.setattr(Device, "call", call)
    everything(DriverStandIn())
    assert len({name for name, _ in made}) > 25
    for name, arguments in made:
        # Arguments are converted first, and what cannot be is a TypeError; then the library is missing.
        given = [
            bindings.CUstreamCaptureMode(int(each)) if isinstance(each, driver_stand_in.CUstreamCaptureMode) else each
            for each in arguments
        ]
        with pytest.raises(absent):
            getattr(bindings, name)(*given)


def test_the_stand_ins_numbers_are_the_real_ones() -> None:
    bindings = pytest.importorskip("cuda.bindings.driver")
    for name in ("CUresult", "CUstream_flags", "CUevent_flags", "CUstreamCaptureMode"):
        for member in getattr(driver_stand_in, name):
            assert int(getattr(getattr(bindings, name), member.name)) == member
