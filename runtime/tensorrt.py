"""Plans of TensorRT and TensorRT-RTX, whose Python modules have one and the same interface."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.monitor import Log, one_line
from ..engines.tensorrt import load
from ..errors import BackendError, DeviceMemoryError, InputError
from .cuda import Buffer, PinnedBuffer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ..engines.manifest import Component
    from ..engines.tensorrt import BackendName
    from .cuda import Device, Stream
    from .device_workspace import Workspace

# What both modules write when they cannot allocate.
_MEMORY = re.compile(r"out of memory|OutOfMemory|could not be allocated", re.IGNORECASE)
_ASKED = re.compile(r"[Rr]equested (?:size was|amount of (?:GPU )?memory \()\s*(\d+)")


def profile_of(component: Component, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Choose the optimisation profile for a request: of those that take its shapes, the one that is fastest at them.

    Parameters
    ----------
    component
        What the manifest says of an engine.
    shapes
        Of its inputs, by name.

    Returns
    -------
    int
        TensorRT's index of it.

    Raises
    ------
    InputError
        No profile takes them; the message lists those that there are.

    """
    fitting = [
        (sum(shapes[name] != part.opt for name, part in ranges.items()), index)
        for index, ranges in enumerate(component.profiles)
        if all(_within(shapes[name], part.min, part.max) for name, part in ranges.items())
    ]
    if fitting:
        return min(fitting)[1]
    decisive = _decisive(component)
    held = dict.fromkeys(_describe(ranges[decisive].min, ranges[decisive].max) for ranges in component.profiles)
    asked = _describe(shapes[decisive], shapes[decisive])
    raise InputError(
        f"{component.name} takes no {decisive} of {asked}: this bundle's engine takes {', '.join(held)}. "
        "These are batch, channels, height / 8 and width / 8, and guidance doubles the batch: "
        "ask for one of them, or build engines for yours with --size and --images"
    )


def _decisive(component: Component) -> str:
    """Name the input whose shape tells most."""
    names = [spec.name for spec in component.inputs]
    return "latents" if "latents" in names else names[0]


def _within(shape: tuple[int, ...], least: tuple[int, ...], most: tuple[int, ...]) -> bool:
    return len(shape) == len(least) and all(
        low <= size <= high for size, low, high in zip(shape, least, most, strict=True)
    )


def _describe(least: tuple[int, ...], most: tuple[int, ...]) -> str:
    low, high = ("x".join(map(str, shape)) for shape in (least, most))
    return low if low == high else f"{low} to {high}"


class TensorRTSession:
    """One component of an engine bundle, deserialised: its weights are in the GPU's memory once.

    Parameters
    ----------
    device, stream
        Where it runs.
    workspace
        For activations, shared with other sessions of the same stream.
    backend
        Which of the two modules.
    plan
        The ``.plan`` file, verified.
    component
        What the manifest says of it.
    cache
        Where TensorRT-RTX keeps the kernels that it compiled for this GPU, so that the next start need not.

    Raises
    ------
    DeviceMemoryError
        The GPU has too little free memory for the weights.
    BackendError
        TensorRT does not take the plan.

    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        *,
        workspace: Workspace,
        backend: BackendName,
        plan: Path,
        component: Component,
        cache: Path,
    ) -> None:
        self.device, self.stream, self.workspace = device, stream, workspace
        self.backend, self.component = backend, component
        self.trt = load(backend)
        self.log = Log(self.trt)
        # The weights, which are nearly all of the plan, go to the GPU: TensorRT's own message would tell no figures.
        device.require(plan.stat().st_size, f"the engine of {component.name}")
        self._runtime: Any = self.trt.Runtime(self.log.logger)
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            self.engine: Any = self._runtime.deserialize_cuda_engine(memory)
        if self.engine is None:
            raise self.failure(f"does not load {plan}")
        self._check_tensors(plan)
        self._cache_file = cache
        self._kept = b""
        self._cache: Any = None

    def _check_tensors(self, plan: Path) -> None:
        held = {self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)}
        wanted = {spec.name for spec in (*self.component.inputs, *self.component.outputs)}
        if held != wanted:
            raise BackendError(
                f"{plan} has the tensors {', '.join(sorted(held))}: expected {', '.join(sorted(wanted))}: "
                "build the bundle again"
            )

    def failure(self, what: str) -> BackendError:
        """Make an error of what TensorRT said last, and forget that."""
        cause = "; ".join(self.log.errors) or "it gives no reason"
        self.log.errors.clear()
        message = f"{self.backend} {what}: {one_line(cause)}"
        if not _MEMORY.search(cause):
            return BackendError(message)
        asked, free = _ASKED.search(cause), self.device.memory()[0]
        if asked is None:
            return DeviceMemoryError(f"{message}; {free} bytes of GPU memory are free", None, free)
        return DeviceMemoryError.of(int(asked[1]), free, f"{self.component.name} in {self.backend}")

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> TensorRTBinding:
        """Make buffers for inputs and outputs, all of them named in `shapes`, and bind them.

        Raises
        ------
        InputError
            The engine takes no such shapes; the message lists those that it takes.
        BackendError
            The GPU failed, or has too little memory.

        """
        return TensorRTBinding(self, profile_of(self.component, shapes), shapes)

    def context(self, *, own_graph: bool = False) -> Any:
        """Make an execution context without memory of its own.

        Parameters
        ----------
        own_graph
            TensorRT-RTX captures and replays its work by itself.

        """
        trt = self.trt
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.backend == "tensorrt-rtx":
            # Kernels for the very shapes, compiled at once: in a graph the makeshift ones would stay for ever.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            strategies = trt.CudaGraphStrategy
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if own_graph else strategies.DISABLED
            config.set_runtime_cache(self._runtime_cache(config))
        context = self.engine.create_execution_context(runtime_config=config)
        if context is None:
            raise self.failure(f"cannot prepare {self.component.name}")
        return context

    def _runtime_cache(self, config: Any) -> Any:
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):
                self._kept = self._cache_file.read_bytes()
            # It is refused, and then filled anew, if it comes from another GPU, driver or version.
            if self._kept and not self._cache.deserialize(self._kept):
                self._kept = b""
        return self._cache

    def keep(self) -> None:
        """Keep the compiled kernels on disk, if there are new ones."""
        if self._cache is None:
            return
        blob = self._cache.serialize()
        content = b"" if blob is None else bytes(memoryview(blob))
        if not content or content == self._kept:
            return
        self._kept = content
        # Not being able to keep them costs time at the next start and nothing else.
        with suppress(OSError):
            self._cache_file.parent.mkdir(parents=True, exist_ok=True)
            draft = self._cache_file.with_suffix(f".{os.getpid()}")
            draft.write_bytes(content)
            draft.replace(self._cache_file)

    def close(self) -> None:
        """Free the weights; bindings must be closed."""
        self._cache = self.engine = self._runtime = None


class TensorRTBinding:
    """An execution context with its buffers: addresses are set once."""

    def __init__(self, session: TensorRTSession, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._session = session
        self._version = -1
        self._buffers: dict[str, Buffer | PinnedBuffer] = {}
        self.graph_obstacle: str | None = None
        component, trt = session.component, session.trt
        self._needed = max(int(session.engine.get_device_memory_size_for_profile_v2(profile)), 1)
        session.workspace.reserve(self._needed)
        with ExitStack() as stack:
            for spec in (*component.inputs, *component.outputs):
                nbytes = int(np.prod(shapes[spec.name])) * np.dtype(spec.dtype).itemsize
                # What decides on shapes is read by the host.
                on_host = session.engine.get_tensor_location(spec.name) == trt.TensorLocation.HOST
                buffer: Buffer | PinnedBuffer
                buffer = PinnedBuffer(session.device, nbytes) if on_host else Buffer(session.device, nbytes)
                stack.callback(buffer.close)
                self._buffers[spec.name] = buffer
            self.addresses = {name: buffer.pointer for name, buffer in self._buffers.items()}
            stack.callback(self._drop_context)
            self._context: Any = session.context()
            self._set_up(profile, shapes)
            self._see_about_graphs(profile, shapes)
            self._stack = stack.pop_all()

    def _set_up(self, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        session, context = self._session, self._context
        name = session.component.name
        try:
            context.set_optimization_profile_async(profile, session.stream.pointer)
            for spec in session.component.inputs:
                if not context.set_input_shape(spec.name, tuple(shapes[spec.name])):
                    raise session.failure(f"does not take {spec.name} of {name} in {shapes[spec.name]}")
            for tensor, address in self.addresses.items():
                if not context.set_tensor_address(tensor, address):
                    raise session.failure(f"does not take the memory of {tensor} of {name}")
            if missing := context.infer_shapes():
                raise session.failure(f"cannot tell the shapes of {name} for want of {', '.join(missing)}")
        except BackendError:
            raise
        except RuntimeError as error:  # of its bindings, where the log says what is wrong
            raise session.failure(f"cannot prepare {name} ({one_line(error)})") from error
        for spec in session.component.outputs:
            found = tuple(context.get_tensor_shape(spec.name))
            if found != tuple(shapes[spec.name]):
                raise BackendError(f"{name} gives {spec.name} of shape {found}: expected {shapes[spec.name]}")
        self._version = -1
        self.prepare()

    def _see_about_graphs(self, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        session = self._session
        if session.backend != "tensorrt-rtx" or self._context.is_stream_capturable(session.stream.pointer):
            return
        self._context = None
        self._context = session.context(own_graph=True)
        self._set_up(profile, shapes)
        self.graph_obstacle = (
            f"tensorrt-rtx does not let {session.component.name} be captured; it captures it by itself"
        )

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Enqueue the upload of an input, of the binding's shape; the array may change afterwards."""
        buffer = self._buffers[name]
        (spec,) = (spec for spec in self._session.component.inputs if spec.name == name)
        data = np.ascontiguousarray(array, spec.dtype)
        if isinstance(buffer, PinnedBuffer):
            ctypes.memmove(buffer.pointer, data.ctypes.data, data.nbytes)
        else:
            self._session.stream.copy_in(buffer.pointer, data.ctypes.data, data.nbytes)

    def prepare(self) -> int:
        """Give the context the shared memory where it is now, and return a number that changes when it moves."""
        workspace = self._session.workspace
        buffer = workspace.reserve(self._needed)
        if workspace.version != self._version:
            self._context.set_device_memory(buffer.pointer, buffer.nbytes)
            self._version = workspace.version
        return self._version

    def enqueue(self) -> None:
        """Enqueue the computation of the outputs from the inputs."""
        session = self._session
        if not self._context.execute_async_v3(session.stream.pointer):
            raise session.failure(f"failed in {session.component.name}")

    def place(self, name: str, address: int) -> None:
        """Let an output be written to another address; 0 for the binding's own buffer."""
        chosen = address or self._buffers[name].pointer
        if self.addresses[name] != chosen:
            if not self._context.set_tensor_address(name, chosen):
                raise self._session.failure(f"does not take the memory of {name}")
            self.addresses[name] = chosen

    def _drop_context(self) -> None:
        self._context = None

    def close(self) -> None:
        """Free what the binding holds; the stream must be done with it."""
        self._stack.close()
