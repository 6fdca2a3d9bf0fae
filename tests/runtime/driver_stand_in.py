"""A STAND-IN for NVIDIA's driver, for tests on machines without a GPU. It is not CUDA, and proves nothing about a GPU.

What it offers is the part of ``cuda.bindings.driver`` that `sdrt.runtime.cuda` calls, with the same names, arguments
and results. Device memory is the host's; a stream is a queue of Python functions that are called when somebody waits
for them and not before, so that what reads a result too early, or overwrites an upload too early, is found out. A
capture keeps the functions, a graph's launch queues them. The one kernel computes in numpy what its source says.

It shows the order of calls, the bookkeeping of memory, and the handling of errors. Whether the real driver agrees is
for the tests marked ``gpu``.
"""

# ruff: noqa: N802 - the functions have the driver's names

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from sdrt.runtime.device_kernel import CONTROL, DEPTH, NAME, ROW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


OK = CUresult.CUDA_SUCCESS


class CUstream_flags(IntEnum):  # noqa: N801 - cuda.bindings' name
    CU_STREAM_DEFAULT = 0
    CU_STREAM_NON_BLOCKING = 1


class CUevent_flags(IntEnum):  # noqa: N801 - cuda.bindings' name
    CU_EVENT_DEFAULT = 0
    CU_EVENT_BLOCKING_SYNC = 1
    CU_EVENT_DISABLE_TIMING = 2


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class Handle(int):
    """What the bindings return for a stream, an event, a graph: an object that int() takes."""


@dataclass
class _Stream:
    queue: deque[Callable[[], None]] = field(default_factory=deque)
    captured: list[Callable[[], None]] | None = None
    capturing_thread: int | None = None
    broken: bool = False
    queued: int = 0
    done: int = 0
    at_work: bool = False


@dataclass
class _Event:
    timing: bool
    stream: int = 0
    ticket: int = 0
    reached_at: float | None = None


RELEASES = {
    "cuMemFree",
    "cuMemFreeHost",
    "cuStreamDestroy",
    "cuEventDestroy",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuModuleUnload",
    "cuDevicePrimaryCtxRelease",
    "cuCtxPopCurrent",
    "cuStreamEndCapture",
}
"""What gives something back. The driver may report an earlier failure there, and gives it back all the same."""

_NO_CONTEXT_NEEDED = {
    *("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease"),
    *("cuCtxPushCurrent", "cuCtxPopCurrent", "cuGetErrorName", "cuGetErrorString"),
}


class DriverStandIn:
    """Stands in for the module ``cuda.bindings.driver``.

    Attributes
    ----------
    total
        Bytes of memory that there are.
    fail_at, fail_with
        The call, counted from 0, that fails, and its code; None for none.
    calls
        The names of all calls so far.
    live
        What was made and not given back, by kind.

    """

    def __init__(self, total: int = 2**24) -> None:
        self.CUresult, self.CUstream_flags, self.CUevent_flags = CUresult, CUstream_flags, CUevent_flags
        self.CUstreamCaptureMode, self.CUstream = CUstreamCaptureMode, Handle
        self.total = total
        self.fail_at: int | None = None
        self.fail_with = CUresult.CUDA_ERROR_LAUNCH_FAILED
        self.calls: list[str] = []
        self.live: dict[str, dict[int, Any]] = {
            kind: {} for kind in ("memory", "pinned", "stream", "event", "graph", "executable", "module")
        }
        self.retained = 0
        self._functions: dict[int, bytes] = {}
        self._contexts = threading.local()
        self._next = 0x1000
        self._lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        member = object.__getattribute__(self, name)
        if not name.startswith("cu") or not callable(member):
            return member

        def call(*arguments: Any) -> tuple[Any, ...]:
            with self._lock:
                if name.startswith("cuGetError"):
                    return tuple(member(*arguments))
                number = len(self.calls)
                self.calls.append(name)
                failing = number == self.fail_at
                if failing and name not in RELEASES:
                    return (self.fail_with,)
                if name not in _NO_CONTEXT_NEEDED and not self._stack:
                    return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
                result = member(*arguments)
                result = result if isinstance(result, tuple) else (result,)
                if failing and name == "cuStreamEndCapture" and result[0] == OK:
                    self._drop("graph", result[1])
                return (self.fail_with,) if failing else result

        return call

    # Bookkeeping for the tests

    def left(self) -> dict[str, int]:
        """What was made and not given back."""
        left = {kind: len(things) for kind, things in self.live.items() if things}
        return (
            left
            | ({"context": self.retained} if self.retained else {})
            | ({"pushed": len(self._stack)} if self._stack else {})
        )

    def count(self, *names: str) -> int:
        """How often functions were called."""
        counted = Counter(self.calls)
        return sum(counted[name] for name in names)

    @property
    def used(self) -> int:
        return sum(array.nbytes for array in self.live["memory"].values())

    def view(self, pointer: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Memory of the GPU, or pinned, at an address; all of it has to be within one allocation."""
        for kind in ("memory", "pinned"):
            for start, array in self.live[kind].items():
                if start <= pointer and pointer + nbytes <= start + array.nbytes:
                    part: np.ndarray[Any, np.dtype[np.uint8]] = array[pointer - start : pointer - start + nbytes]
                    return part
        raise AssertionError(f"{nbytes} bytes at {pointer:#x} are no memory that is allocated")

    def floats(self, pointer: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return self.view(pointer, 4 * count).view(np.float32)

    def enqueue(self, stream: int, work: Callable[[], None]) -> CUresult:
        """Queue work, as any library does that is given a stream."""
        with self._lock:
            queue = self._stream(stream)
            if queue.captured is not None:
                queue.captured.append(work)
                return OK
            queue.queued += 1
            queue.queue.append(work)
            return OK

    def break_capture(self, stream: int) -> None:
        """Do what no capture allows."""
        queue = self._stream(stream)
        if queue.captured is not None:
            queue.broken = True

    # The driver

    @property
    def _stack(self) -> list[int]:
        if not hasattr(self._contexts, "stack"):
            self._contexts.stack = []
        stack: list[int] = self._contexts.stack
        return stack

    def _new(self, kind: str, thing: Any) -> tuple[CUresult, Handle]:
        self._next += 0x1000
        self.live[kind][self._next] = thing
        return OK, Handle(self._next)

    def _drop(self, kind: str, handle: int) -> CUresult:
        return OK if self.live[kind].pop(int(handle), None) is not None else CUresult.CUDA_ERROR_INVALID_HANDLE

    def _stream(self, stream: int) -> _Stream:
        found: _Stream = self.live["stream"][int(stream)]
        return found

    def _run_until(self, stream: int, ticket: int) -> None:
        queue = self._stream(stream)
        # The garbage collector may come upon a buffer to free amid a function, which cannot be awaited from there.
        while queue.done < ticket and not queue.at_work:
            queue.at_work = True
            try:
                queue.queue.popleft()()
            finally:
                queue.done += 1
                queue.at_work = False

    def _capturing(self) -> _Stream | None:
        """A capture of this thread's, which forbids it what could wait."""
        streams = self.live["stream"].values()
        return next((each for each in streams if each.capturing_thread == threading.get_ident()), None)

    def _not_while_capturing(self) -> CUresult:
        if (stream := self._capturing()) is not None:
            stream.broken = True
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        return OK

    def cuGetErrorName(self, code: int) -> tuple[CUresult, bytes]:
        return OK, CUresult(code).name.encode()

    def cuGetErrorString(self, code: int) -> tuple[CUresult, bytes]:
        return OK, CUresult(code).name.lower().replace("_", " ").encode()

    def cuInit(self, flags: int) -> CUresult:
        assert flags == 0
        return OK

    def cuDeviceGet(self, ordinal: int) -> tuple[CUresult, int] | CUresult:
        return (OK, ordinal) if ordinal == 0 else CUresult.CUDA_ERROR_INVALID_DEVICE

    def cuDevicePrimaryCtxRetain(self, _device: int) -> tuple[CUresult, int]:
        self.retained += 1
        return OK, 77

    def cuDevicePrimaryCtxRelease(self, _device: int) -> CUresult:
        self.retained -= 1
        return OK

    def cuCtxPushCurrent(self, context: int) -> CUresult:
        if not self.retained:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT
        self._stack.append(context)
        return OK

    def cuCtxPopCurrent(self) -> tuple[CUresult, int]:
        return OK, self._stack.pop()

    def cuMemGetInfo(self) -> tuple[CUresult, int, int]:
        return OK, self.total - self.used, self.total

    def _allocate(self, kind: str, size: int) -> tuple[CUresult, int]:
        block = np.full(size + 256, 0xEE, np.uint8)  # a float32 of these bytes is far from anything sensible
        start = -block.ctypes.data % 256
        array = block[start : start + size]
        self.live[kind][array.ctypes.data] = array
        return OK, array.ctypes.data

    def cuMemAlloc(self, size: int) -> tuple[CUresult, int] | CUresult:
        if code := self._not_while_capturing():
            return code
        if size == 0:
            return CUresult.CUDA_ERROR_INVALID_VALUE
        if self.used + size > self.total:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY
        return self._allocate("memory", size)

    def cuMemFree(self, pointer: int) -> CUresult:
        for stream in list(self.live["stream"]):
            self._run_until(stream, self._stream(stream).queued)  # it waits for the device
        return self._drop("memory", pointer)

    def cuMemHostAlloc(self, size: int, _flags: int) -> tuple[CUresult, int] | CUresult:
        if code := self._not_while_capturing():
            return code
        return self._allocate("pinned", size)

    def cuMemFreeHost(self, pointer: int) -> CUresult:
        return self._drop("pinned", pointer)

    def _copy(self, target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> CUresult:
        self.view(target, size)
        try:
            self.view(source, size)
        except AssertionError:
            # Pageable memory is read before the call returns.
            kept = ctypes.create_string_buffer(ctypes.string_at(source, size), size)
            return self.enqueue(stream, lambda: self._copy(target, ctypes.addressof(kept), size))
        return self.enqueue(stream, lambda: self._copy(target, source, size))

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> CUresult:
        self.view(source, size)
        return self.enqueue(stream, lambda: self._copy(target, source, size))

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> CUresult:
        self.view(source, size)
        self.view(target, size)
        return self.enqueue(stream, lambda: self._copy(target, source, size))

    def cuMemcpyDtoH(self, target: int, source: int, size: int) -> CUresult:
        # It does not wait for streams that are not blocking.
        if code := self._not_while_capturing():
            return code
        self.view(source, size)
        self._copy(target, source, size)
        return OK

    def cuStreamCreate(self, flags: int) -> tuple[CUresult, Handle]:
        assert flags == CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._new("stream", _Stream())

    def cuStreamDestroy(self, stream: int) -> CUresult:
        self._run_until(stream, self._stream(stream).queued)
        return self._drop("stream", stream)

    def cuStreamSynchronize(self, stream: int) -> CUresult:
        if code := self._not_while_capturing():
            return code
        self._run_until(stream, self._stream(stream).queued)
        return OK

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> CUresult:
        assert flags == 0
        awaited: _Event = self.live["event"][int(event)]
        other, ticket = awaited.stream, awaited.ticket
        if int(stream) not in self.live["stream"]:
            return OK  # a consumer's own stream, which nothing here runs
        return self.enqueue(stream, lambda: self._run_until(other, ticket) if other else None)

    def cuStreamBeginCapture(self, stream: int, mode: int) -> CUresult:
        assert mode == CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        queue = self._stream(stream)
        queue.captured, queue.capturing_thread, queue.broken = [], threading.get_ident(), False
        return OK

    def cuStreamEndCapture(self, stream: int) -> tuple[CUresult, Handle | None]:
        queue = self._stream(stream)
        captured, queue.captured, queue.capturing_thread = queue.captured, None, None
        if queue.broken:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        return self._new("graph", captured)

    def cuEventCreate(self, flags: int) -> tuple[CUresult, Handle]:
        return self._new("event", _Event(timing=not flags & CUevent_flags.CU_EVENT_DISABLE_TIMING))

    def cuEventDestroy(self, event: int) -> CUresult:
        return self._drop("event", event)

    def cuEventRecord(self, event: int, stream: int) -> CUresult:
        marked: _Event = self.live["event"][int(event)]

        def reach() -> None:
            marked.reached_at = time.perf_counter()

        self.enqueue(stream, reach)
        marked.stream, marked.ticket = int(stream), self._stream(stream).queued
        return OK

    def cuEventSynchronize(self, event: int) -> CUresult:
        if code := self._not_while_capturing():
            return code
        awaited: _Event = self.live["event"][int(event)]
        if awaited.stream in self.live["stream"]:
            self._run_until(awaited.stream, awaited.ticket)
        return OK

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[CUresult, float]:
        first, last = self.live["event"][int(start)], self.live["event"][int(end)]
        assert first.timing
        assert last.timing
        return OK, 1000 * (last.reached_at - first.reached_at)

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[CUresult, Handle]:
        assert flags == 0
        return self._new("executable", list(self.live["graph"][int(graph)]))

    def cuGraphDestroy(self, graph: int) -> CUresult:
        return self._drop("graph", graph)

    def cuGraphLaunch(self, executable: int, stream: int) -> CUresult:
        for work in self.live["executable"][int(executable)]:
            self.enqueue(stream, work)
        return OK

    def cuGraphExecDestroy(self, executable: int) -> CUresult:
        return self._drop("executable", executable)

    def cuModuleLoadData(self, image: bytes) -> tuple[CUresult, Handle] | CUresult:
        if not image.endswith(b"\0") or b".entry" not in image:
            return CUresult.CUDA_ERROR_INVALID_IMAGE
        return self._new("module", image)

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[CUresult, Handle] | CUresult:
        if b".entry " + name + b"(" not in self.live["module"][int(module)]:
            return CUresult.CUDA_ERROR_NOT_FOUND
        self._functions[int(module) + 1] = name
        return OK, Handle(module + 1)

    def cuModuleUnload(self, module: int) -> CUresult:
        return self._drop("module", module)

    def cuLaunchKernel(
        self,
        function: int,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        block_x: int,
        block_y: int,
        block_z: int,
        shared: int,
        stream: int,
        packed: tuple[tuple[int, ...], tuple[type, ...]],
        extra: int,
    ) -> CUresult:
        assert self._functions[int(function)] == NAME.encode()
        assert (grid_y, grid_z, block_y, block_z, shared, extra) == (1, 1, 1, 1, 0, 0)
        values, types = packed
        assert types == (ctypes.c_void_p,) * 6 + (ctypes.c_uint,) * 2
        assert grid_x * block_x >= values[6]
        return self.enqueue(stream, lambda: self._step(*values))

    def _step(
        self,
        control: int,
        prediction: int,
        latents: int,
        previous: int,
        history: int,
        timestep: int,
        size: int,
        other: int,
    ) -> None:
        """Compute what `sdrt.runtime.device_kernel.SOURCE` says, in its order of rounding; nothing for no control."""
        if not control:
            return
        state = self.view(control, CONTROL.itemsize).view(CONTROL)[0]
        index, count = int(state["index"]), int(state["count"])
        if index >= count:
            return
        rows = self.view(int(state["rows"]), count * ROW.itemsize).view(ROW)
        row = rows[index]
        x = self.floats(latents, size).copy()
        f = self.floats(prediction, size)
        conditional = self.floats(prediction + 4 * other, size)
        past = self.floats(history, DEPTH * size).reshape(DEPTH, size)
        with np.errstate(all="ignore"):  # before the first prediction there is anything in its place
            guided = (conditional - f) * row["guidance"] + f
            m = guided * row["q"]
        if row["p"]:
            m += x * row["p"]
        past[index % DEPTH] = m
        x_next = x * row["a"]
        if row["a_prev"]:
            x_next += self.floats(previous, size) * row["a_prev"]
        for back in range(DEPTH):
            if row["b"][back]:
                x_next += past[(index - back) % DEPTH] * row["b"][back]
        if row["c"]:
            x_next += self.floats(int(state["noise"]) + 4 * size * int(row["noise"]), size) * row["c"]
        self.floats(previous, size)[...] = x
        self.floats(latents, size)[...] = x_next
        self.floats(latents + 4 * other, size)[...] = x_next
        self.floats(int(state["trajectory"]) + 4 * index * int(state["stride"]), size)[...] = x_next
        self.view(control, 4).view(np.int32)[0] = index + 1
        if index + 1 < count:
            self.floats(timestep, 1)[0] = rows[index + 1]["timestep"]


class EngineStandIn:
    """Stands in for an engine's binding: computes a known function of its inputs, when its stream gets to it.

    Parameters
    ----------
    driver, stream
        Where it runs.
    device
        Where its buffers are.
    shapes
        Of ``latents``, ``timestep``, ``text_embeddings`` and ``prediction``.
    capturable
        False for an engine that waits for the GPU in the middle.

    """

    def __init__(
        self,
        driver: DriverStandIn,
        stream: int,
        device: Any,
        shapes: dict[str, tuple[int, ...]],
        *,
        capturable: bool = True,
    ) -> None:
        from sdrt.runtime.cuda import Buffer

        self._driver, self._stream, self._capturable = driver, stream, capturable
        self._shapes = shapes
        self._buffers: dict[str, Buffer] = {}
        self.graph_obstacle: str | None = None
        self.version = 1
        self.enqueued = 0
        with contextlib.ExitStack() as stack:
            for name, shape in shapes.items():
                self._buffers[name] = stack.enter_context(Buffer(device, 4 * int(np.prod(shape))))
            self._stack = stack.pop_all()
        self.addresses = {name: buffer.pointer for name, buffer in self._buffers.items()}

    def array(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        shape = self._shapes[name]
        return self._driver.floats(self.addresses[name], int(np.prod(shape))).reshape(shape)

    def write(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self.array(name)[...] = array

    def prepare(self) -> int:
        return self.version

    def enqueue(self) -> None:
        self.enqueued += 1
        if not self._capturable:
            self._driver.break_capture(self._stream)
        self._driver.enqueue(self._stream, self._compute)

    def _compute(self) -> None:
        self.array("prediction")[...] = network(
            self.array("latents"), float(self.array("timestep")[0]), self.array("text_embeddings")
        )

    def place(self, name: str, address: int) -> None:
        self.addresses[name] = address or self._buffers[name].pointer

    def close(self) -> None:
        self._stack.close()


def network(latents: Any, timestep: float, embeddings: Any) -> Any:
    """What the stand-in for the U-Net predicts: a smooth function in which every input matters."""
    told = embeddings.mean(axis=(1, 2), dtype=np.float32)[:, None, None, None]
    return np.tanh(latents + np.float32(timestep / 700) + told, dtype=np.float32)


@contextlib.contextmanager
def garbage_collected() -> Iterator[None]:
    """Collect the garbage that is made meanwhile, and none but that: looking through all of torch takes seconds."""
    gc.freeze()
    try:
        yield
        gc.collect()
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def nothing_left(driver: DriverStandIn) -> Iterator[None]:
    """Check that all was given back at the end."""
    with garbage_collected():
        yield
    assert driver.left() == {}
