"""ONNX graphs on an NVIDIA GPU through onnxruntime's CUDA provider, with buffers and stream of our own."""

from __future__ import annotations

import itertools
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BackendError, DeviceMemoryError, MissingDependencyError
from .cuda import Buffer
from .onnx import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ..engines.manifest import Component
    from .cuda import Device, Stream

_PROVIDER = "CUDAExecutionProvider"
_ASKED = re.compile(r"Failed to allocate memory for requested buffer of size (\d+)")
_OWN_GRAPH = "onnxruntime captures the network by itself"


class OnnxCudaSession:
    """One component of an ONNX bundle, loaded onto the GPU.

    Of the U-Net, which runs once a step, onnxruntime captures a CUDA graph. Before a version of mid-2026 it then waits
    for the GPU after every step.

    Parameters
    ----------
    device, stream
        Where it runs.
    graph
        The ``.onnx`` file.
    component
        What the manifest says of it.

    Raises
    ------
    MissingDependencyError
        onnxruntime is not installed.
    BackendError
        onnxruntime does not take the graph, or cannot use the GPU.

    """

    def __init__(self, device: Device, stream: Stream, graph: Path, component: Component) -> None:
        try:
            import onnxruntime  # noqa: PLC0415 - 0.1 s that --help need not pay
        except ImportError:
            raise MissingDependencyError("onnxruntime", "running an ONNX bundle", "gpu") from None
        self.onnxruntime: Any = onnxruntime
        self.device, self.stream, self.component = device, stream, component
        self._graph = graph
        self.graph_numbers = itertools.count(1)
        device.require(sum(entry.bytes for entry in component.files[1:2]), f"the weights of {component.name}")
        self.graph_obstacle = _OWN_GRAPH
        self.captures = component.name == "unet"
        try:
            self.session: Any = self._load(captures=self.captures)
        except BackendError as error:
            if not self.captures:
                raise
            # It refuses to capture what it would run on the CPU in part.
            self.captures, self.graph_obstacle = False, str(error)
            self.session = self._load(captures=False)

    def _load(self, *, captures: bool) -> Any:
        options = self.onnxruntime.SessionOptions()
        options.log_severity_level = 3
        provider = {
            "device_id": str(self.device.ordinal),
            "user_compute_stream": str(self.stream.pointer),
            "enable_cuda_graph": "1" if captures else "0",
            # By default the arena doubles whenever it grows, which takes twice what the VAE needs.
            "arena_extend_strategy": "kSameAsRequested",
            # float32 is float32: TensorFloat-32 has ten bits.
            "use_tf32": "0",
        }
        try:
            session = self.onnxruntime.InferenceSession(
                self._graph, options, providers=[(_PROVIDER, provider), "CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's classes share no other base
            raise self.failure(f"does not load {self._graph}", error) from error
        if _PROVIDER not in session.get_providers():
            raise BackendError(
                f"onnxruntime cannot use the GPU for {self._graph}: its CUDA libraries do not load; see "
                "https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html for those that it needs"
            )
        return session

    def failure(self, what: str, error: Exception) -> BackendError:
        """Make an error of onnxruntime's."""
        line = first_line(error)
        if match := _ASKED.search(str(error)):
            return DeviceMemoryError.of(int(match[1]), self.device.memory()[0], f"{self.component.name} in onnxruntime")
        return BackendError(f"onnxruntime {what}: {line}")

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> OnnxCudaBinding:
        """Make buffers for the inputs and for those outputs that `shapes` names, and bind them.

        Raises
        ------
        BackendError
            The GPU failed, or has too little memory.

        """
        binding = OnnxCudaBinding(self, shapes)
        if not self.captures:
            return binding
        try:
            binding.enqueue()  # of whatever the buffers hold: this captures the graph
        except DeviceMemoryError:
            binding.close()
            raise
        except BackendError as error:
            binding.close()
            self.captures, self.graph_obstacle = False, str(error)
            self.session = self._load(captures=False)
            return OnnxCudaBinding(self, shapes)
        return binding

    def keep(self) -> None:
        """Keep nothing: onnxruntime compiles nothing that lasts."""

    def close(self) -> None:
        """Free the weights."""
        self.session = None


class OnnxCudaBinding:
    """Buffers in the GPU's memory that onnxruntime reads and writes in place."""

    def __init__(self, session: OnnxCudaSession, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._session = session
        self._shapes = shapes
        self.graph_obstacle: str | None = session.graph_obstacle
        component = session.component
        wanted = (*component.inputs, *(spec for spec in component.outputs if spec.name in shapes))
        self._specs = {spec.name: spec for spec in wanted}
        self._inputs = {spec.name for spec in component.inputs}
        self._buffers: dict[str, Buffer] = {}
        self.addresses: dict[str, int] = {}
        self._options = session.onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if session.captures:
            # A graph has its buffers' addresses in it, so that each binding has its own.
            self._options.add_run_config_entry("gpu_graph_id", str(next(session.graph_numbers)))
        self._onnx = session.session
        self._io: Any = self._onnx.io_binding()
        with ExitStack() as stack:
            stack.callback(self._drop)
            for name, spec in self._specs.items():
                nbytes = int(np.prod(shapes[name])) * np.dtype(spec.dtype).itemsize
                self._buffers[name] = stack.enter_context(Buffer(session.device, nbytes))
                self._bind(name, self._buffers[name].pointer)
            self._stack = stack.pop_all()

    def _bind(self, name: str, address: int) -> None:
        bind = self._io.bind_input if name in self._inputs else self._io.bind_output
        element = np.dtype(self._specs[name].dtype).type
        bind(name, "cuda", self._session.device.ordinal, element, self._shapes[name], address)
        self.addresses[name] = address

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Enqueue the upload of an input, of the binding's shape; the array may change afterwards."""
        data = np.ascontiguousarray(array, self._specs[name].dtype)
        self._session.stream.copy_in(self.addresses[name], data.ctypes.data, data.nbytes)

    def prepare(self) -> int:
        """Return a number that never changes: onnxruntime has memory of its own."""
        return 0

    def enqueue(self) -> None:
        """Enqueue the computation of the outputs from the inputs."""
        session = self._session
        try:
            self._onnx.run_with_iobinding(self._io, self._options)
        except Exception as error:  # onnxruntime's classes share no other base
            raise session.failure(f"failed in {session.component.name}", error) from error

    def place(self, name: str, address: int) -> None:
        """Let an output be written to another address; 0 for the binding's own buffer."""
        chosen = address or self._buffers[name].pointer
        if self.addresses[name] != chosen:
            self._bind(name, chosen)

    def _drop(self) -> None:
        self._io = self._onnx = None

    def close(self) -> None:
        """Free what the binding holds; the stream must be done with it."""
        self._stack.close()
