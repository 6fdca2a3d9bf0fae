"""What sdrt needs of CUDA: memory, streams, events, graphs and kernels, through the driver API of cuda-bindings.

The driver API, because it is libcuda itself: the CUDA runtime that cuda-bindings carries wants a driver as new as it
is. Work is done in the device's primary context, the one that TensorRT, onnxruntime and PyTorch use. Whatever is made
or enqueued here wants that context to be current (`Device.current`); closing makes it current by itself.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

from ..errors import BackendError, DeviceMemoryError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


def load_driver() -> Any:
    """Import ``cuda.bindings.driver``.

    Raises
    ------
    MissingDependencyError
        cuda-bindings is not installed.

    """
    try:
        from cuda.bindings import driver  # noqa: PLC0415 - for those who have a GPU
    except ImportError:
        raise MissingDependencyError("cuda-bindings", "running on an NVIDIA GPU", "rtx") from None
    return driver


class _Closing:
    """Something of the driver's that is given back once: by `close`, or at the end of a ``with``."""

    _device: Device

    def __init__(self, device: Device) -> None:
        self._device = device
        self._open = True

    def close(self) -> None:
        """Give it back; a second call does nothing."""
        if self._open:
            self._open = False
            with ExitStack() as stack:
                try:
                    stack.enter_context(self._device.current())
                finally:
                    self._free()  # whatever happened: the thread may have the context already

    def _free(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Device:
    """A GPU's primary context, which lives until `close` and the last `release` of what was handed out.

    Parameters
    ----------
    ordinal
        Which GPU, as CUDA counts.
    driver
        ``cuda.bindings.driver``, or what stands in for it.

    Raises
    ------
    BackendError
        There is no driver, or no such GPU.

    """

    def __init__(self, ordinal: int = 0, driver: Any = None) -> None:
        self.driver = load_driver() if driver is None else driver
        self.ordinal = ordinal
        self._users = 1
        self._lock = threading.Lock()
        self.call("cuInit", 0)
        self._handle = self.call("cuDeviceGet", ordinal)
        self._context = self.call("cuDevicePrimaryCtxRetain", self._handle)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver.

        Returns
        -------
        Its result, or the tuple of its results where there are several; None where there is none.

        Raises
        ------
        DeviceMemoryError
            There is not enough memory.
        BackendError
            Any other code than success, with CUDA's name and description of it.

        """
        try:
            code, *results = getattr(self.driver, name)(*arguments)
        except RuntimeError as error:  # libcuda is not there, or older than the function
            raise BackendError(f"the NVIDIA driver cannot do {name}: {error}: update the driver") from None
        if code != self.driver.CUresult.CUDA_SUCCESS:
            raise self._error(name, code)
        return results[0] if len(results) == 1 else tuple(results) or None

    def _error(self, name: str, code: Any) -> BackendError:
        if code == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            return DeviceMemoryError(f"the GPU has too little free memory for {name}: make fewer or smaller images")
        texts = []
        for describe in (self.driver.cuGetErrorName, self.driver.cuGetErrorString):
            failed, text = describe(code)
            texts.append("unknown" if failed else text.decode(errors="replace"))
        return BackendError(f"CUDA failed in {name}: {texts[0]} ({texts[1]})")

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this device's context the thread's current one, and then the one that was."""
        self.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent")

    def memory(self) -> tuple[int, int]:
        """Tell how many bytes are free and how many there are, of the whole device."""
        free, total = self.call("cuMemGetInfo")
        return int(free), int(total)

    def require(self, asked: int, purpose: str) -> None:
        """Raise `DeviceMemoryError` if fewer than `asked` bytes are free."""
        free, _ = self.memory()
        if asked > free:
            raise DeviceMemoryError.of(asked, free, purpose)

    def retain(self) -> Device:
        """Keep the context for something that may outlive whoever made it; to be ended by `release`."""
        with self._lock:
            self._users += 1
        return self

    def release(self) -> None:
        """End a `retain`."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.call("cuDevicePrimaryCtxRelease", self._handle)

    def close(self) -> None:
        """End what the constructor began."""
        self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Buffer(_Closing):
    """Memory of the GPU: `pointer` is a multiple of 256, `nbytes` what was asked for.

    Raises
    ------
    DeviceMemoryError
        There is not enough; the message tells the bytes asked for and the bytes free.

    """

    def __init__(self, device: Device, nbytes: int, purpose: str = "the request's buffers") -> None:
        self.nbytes = nbytes
        try:
            # The driver refuses to give nothing.
            self.pointer = int(device.call("cuMemAlloc", max(nbytes, 1)))
        except DeviceMemoryError:
            raise DeviceMemoryError.of(nbytes, device.memory()[0], purpose) from None
        super().__init__(device)

    def _free(self) -> None:
        self._device.call("cuMemFree", self.pointer)


class PinnedBuffer(_Closing):
    """Page-locked memory of the host, from and to which the GPU copies while the host goes on; not zeroed.

    Attributes
    ----------
    view
        Its bytes, writable, as long as it is open.

    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = nbytes
        self.pointer = int(device.call("cuMemHostAlloc", max(nbytes, 1), 0))
        self.view = memoryview((ctypes.c_ubyte * nbytes).from_address(self.pointer)).cast("B")
        super().__init__(device)

    def _free(self) -> None:
        self._device.call("cuMemFreeHost", self.pointer)


class Event(_Closing):
    """A mark in a stream, with its time unless `timing` is off."""

    def __init__(self, device: Device, *, timing: bool = True) -> None:
        flags = device.driver.CUevent_flags
        chosen = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        self.handle = device.call("cuEventCreate", int(chosen))
        super().__init__(device)

    def wait(self) -> None:
        """Let the host wait until the mark is reached."""
        self._device.call("cuEventSynchronize", self.handle)

    def seconds_since(self, earlier: Event) -> float:
        """Tell the time between two marks that have both been reached."""
        return float(self._device.call("cuEventElapsedTime", earlier.handle, self.handle)) / 1000

    def _free(self) -> None:
        self._device.call("cuEventDestroy", self.handle)


class Stream(_Closing):
    """A queue of work for the GPU, its own: the legacy default stream does not wait for it, nor it for that one.

    Attributes
    ----------
    pointer
        The ``cudaStream_t`` as an integer, for other libraries.

    """

    def __init__(self, device: Device) -> None:
        self.handle = device.call("cuStreamCreate", int(device.driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.pointer = int(self.handle)
        super().__init__(device)

    @property
    def open(self) -> bool:
        """Whether it is still there."""
        return self._open

    def copy_in(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy from the host's memory to the GPU's; the source may change once this stream is past it."""
        self._device.call("cuMemcpyHtoDAsync", target, source, nbytes, self.handle)

    def copy_out(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy from the GPU's memory to the host's."""
        self._device.call("cuMemcpyDtoHAsync", target, source, nbytes, self.handle)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy within the GPU's memory."""
        self._device.call("cuMemcpyDtoDAsync", target, source, nbytes, self.handle)

    def record(self, event: Event) -> None:
        """Put the mark here."""
        self._device.call("cuEventRecord", event.handle, self.handle)

    def wait(self, event: Event) -> None:
        """Let what comes later in this stream wait for the mark; the host does not."""
        self._device.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        """Let the host wait until all that was enqueued is done."""
        self._device.call("cuStreamSynchronize", self.handle)

    @contextmanager
    def joined(self, others: Iterable[int]) -> Iterator[None]:
        """Do what is enqueued within after all that other streams hold, and before all that they will be given.

        Parameters
        ----------
        others
            Callers' streams, as integers.

        """
        device = self._device
        streams = [device.driver.CUstream(other) for other in others]
        with Event(device, timing=False) as event:
            for theirs in streams:
                device.call("cuEventRecord", event.handle, theirs)
                self.wait(event)
            try:
                yield
            finally:
                # Also after a failure: what was enqueued before it may be at work in the callers' buffers.
                if streams:
                    self.record(event)
                for theirs in streams:
                    device.call("cuStreamWaitEvent", theirs, event.handle, 0)

    def capture(self, work: Callable[[], object]) -> Graph:
        """Record what `work` enqueues into this stream, without doing it.

        Raises
        ------
        BackendError
            The work cannot be captured. The stream is as it was.

        """
        device = self._device
        # Of this thread alone: what others do with the GPU meanwhile does no harm.
        mode = device.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        device.call("cuStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            # A capture that was broken ends in an error, which the one that broke it explains better.
            code, graph = device.driver.cuStreamEndCapture(self.handle)
            if not code and graph is not None and int(graph):
                device.call("cuGraphDestroy", graph)
            raise
        return Graph(device, device.call("cuStreamEndCapture", self.handle))

    def _free(self) -> None:
        self._device.call("cuStreamDestroy", self.handle)


class Graph(_Closing):
    """Work that was captured, ready to be launched any number of times.

    Parameters
    ----------
    device
        Whose work it is.
    captured
        What ``cuStreamEndCapture`` gave, which this now owns.

    """

    def __init__(self, device: Device, captured: Any) -> None:
        try:
            self._executable = device.call("cuGraphInstantiate", captured, 0)
        except BaseException:
            device.call("cuGraphDestroy", captured)
            raise
        self._captured = captured
        super().__init__(device)

    def launch(self, stream: Stream) -> None:
        """Enqueue all of it."""
        self._device.call("cuGraphLaunch", self._executable, stream.handle)

    def _free(self) -> None:
        try:
            self._device.call("cuGraphExecDestroy", self._executable)
        finally:
            self._device.call("cuGraphDestroy", self._captured)


class Kernel(_Closing):
    """A function of the GPU's, from PTX, which the driver compiles for its GPU and caches by itself."""

    def __init__(self, device: Device, ptx: str, name: str) -> None:
        module = device.call("cuModuleLoadData", ptx.encode("ascii") + b"\0")
        try:
            self._function = device.call("cuModuleGetFunction", module, name.encode("ascii"))
        except BaseException:
            device.call("cuModuleUnload", module)
            raise
        self._module = module
        super().__init__(device)

    def launch(
        self, stream: Stream, blocks: int, threads: int, arguments: tuple[int, ...], types: tuple[type, ...]
    ) -> None:
        """Enqueue one run, of `blocks` blocks of `threads` threads; `types` are ctypes' for the arguments."""
        grid, block, shared, extra = (blocks, 1, 1), (threads, 1, 1), 0, 0
        packed = (arguments, types)
        self._device.call("cuLaunchKernel", self._function, *grid, *block, shared, stream.handle, packed, extra)

    def _free(self) -> None:
        self._device.call("cuModuleUnload", self._module)
