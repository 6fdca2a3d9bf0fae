"""The denoising loop on the GPU: latents, history, noise and table live there, and one graph is replayed for each step.

Between the first step and the last nothing crosses to the host, nor does the host wait. Which row of the table is next
is kept on the GPU, so that all steps of all samplers are one and the same work: the network, then the step's kernel.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import numpy as np

from ..errors import BackendError, SdrtWarning
from .cuda import Buffer, Event, PinnedBuffer
from .device_kernel import CONTROL, DEPTH, pack

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from .cuda import Device, Graph, Stream
    from .device_kernel import StepKernel
    from .device_steps import Recording
    from .session import DeviceBinding
    from .solvers import SamplerTable

_F4 = 4  # bytes of a float32


class DeviceLoop:
    """Buffers and graph for the requests of one shape, one request at a time, all in one stream.

    Parameters
    ----------
    device, stream, kernel
        Where it runs.
    bind
        Makes the U-Net's binding, which the loop then owns.
    shape
        Of the latents of all images: (N, 4, height / 8, width / 8).
    guided
        Whether the network runs twice a step.

    Attributes
    ----------
    binding
        The U-Net's; its ``text_embeddings`` are to be filled before each request.
    graph_obstacle
        Why steps are not replayed from a graph, in one line; None if they are, or nothing is known against it yet.

    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        kernel: StepKernel,
        bind: Callable[[], DeviceBinding],
        shape: tuple[int, ...],
        *,
        guided: bool,
    ) -> None:
        self.shape, self.guided = shape, guided
        self._device, self._stream, self._kernel = device, stream, kernel
        self._size = int(np.prod(shape))
        self._graph: Graph | None = None
        self._version = -1
        self._warm = False
        self._parameters: Buffer | None = None
        self._staging: PinnedBuffer | None = None
        with ExitStack() as stack:
            self.binding = bind()
            stack.callback(self.binding.close)
            self._control = stack.enter_context(Buffer(device, CONTROL.itemsize))
            self._previous = stack.enter_context(Buffer(device, _F4 * self._size))
            self._history = stack.enter_context(Buffer(device, _F4 * self._size * DEPTH))
            self._last = stack.enter_context(Buffer(device, _F4 * self._size))
            self._staged = stack.enter_context(Event(device, timing=False))
            self.graph_obstacle = self.binding.graph_obstacle
            self._stack = stack.pop_all()

    @property
    def result(self) -> int:
        """Address of the last latents of a request without recording."""
        return self._last.pointer

    @property
    def latents_bytes(self) -> int:
        """Size of the latents of all images."""
        return _F4 * self._size

    def begin(
        self,
        table: SamplerTable,
        guidance_scale: float,
        initial: NDArray[np.float32] | int,
        draw_noise: Callable[[], NDArray[np.float32]],
        recording: Recording | None = None,
    ) -> None:
        """Upload all that a request needs, and make the first x of it.

        Parameters
        ----------
        table, guidance_scale
            Of the request.
        initial
            Unit gaussian in the loop's shape, or its address in the GPU's memory.
        draw_noise
            As `.loop.denoise` takes it; called as often, before the first step.
        recording
            Where each step's latents shall be kept; by default the last are.

        Raises
        ------
        BackendError
            The GPU failed, or has too little memory.

        """
        rows, added = pack(table, guidance_scale)
        noise = [draw for draw, used in ((draw_noise(), used) for used in added) if used]
        first = np.zeros(0, np.float32) if isinstance(initial, int) else initial
        parameters = rows.nbytes + sum(part.nbytes for part in noise)
        staging = self._stage(CONTROL.itemsize + parameters + first.nbytes)
        memory = self._reserve(parameters)
        control = np.zeros(1, CONTROL)
        control["count"] = len(rows)
        control["rows"] = memory.pointer
        control["noise"] = memory.pointer + rows.nbytes
        control["trajectory"] = self._last.pointer if recording is None else recording.pointer
        control["stride"] = 0 if recording is None else self._size
        offset, places = 0, []
        for part in (control, rows, *noise, first):
            flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            staging.view[offset : offset + flat.nbytes] = flat.data
            places.append(staging.pointer + offset)
            offset += flat.nbytes
        latents = self.binding.addresses["latents"]
        self._stream.copy_in(self._control.pointer, places[0], CONTROL.itemsize)
        self._stream.copy_in(memory.pointer, places[1], parameters)
        if isinstance(initial, int):
            self._stream.copy(latents, initial, self.latents_bytes)
        else:
            self._stream.copy_in(latents, places[-1], self.latents_bytes)
        self._stream.record(self._staged)
        self._launch()

    def step(self) -> None:
        """Enqueue the next step.

        Raises
        ------
        BackendError
            The GPU failed, or the engine.

        """
        version = self.binding.prepare()
        if version != self._version:
            # The engine's memory has moved: what was captured would write to where it was.
            self._drop_graph()
            self._version, self._warm = version, False
        # The first time an engine runs it may still compile, or allocate, which no capture allows.
        if self._graph is None and self._warm and self.graph_obstacle is None:
            self._capture()
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._enqueue()
            self._warm = True

    def estimate(self, table: SamplerTable, index: int) -> NDArray[np.float32]:
        """Return what the model takes for the finished latents at the last step, which must be done.

        Parameters
        ----------
        table
            The one that the request began with.
        index
            Of that step.

        """
        x, m = np.empty(self.shape, np.float32), np.empty(self.shape, np.float32)
        # The kernel counts the row that makes the first x as well.
        remembered = self._history.pointer + (1 + index) % DEPTH * self.latents_bytes
        with self._device.current():
            for array, source in ((x, self._previous.pointer), (m, remembered)):
                self._device.call("cuMemcpyDtoH", array.ctypes.data, source, self.latents_bytes)
        return table.estimate(index, x, m)

    def replace(self, latents: NDArray[np.float32]) -> None:
        """Go on from other latents, in the loop's shape; waits for what is enqueued."""
        self._stream.synchronize()
        staging = self._stage(self.latents_bytes)
        staging.view[: self.latents_bytes] = np.ascontiguousarray(latents, np.float32).reshape(-1).view(np.uint8).data
        for half in range(2 if self.guided else 1):
            target = self.binding.addresses["latents"] + half * self.latents_bytes
            self._stream.copy_in(target, staging.pointer, self.latents_bytes)
        self._stream.record(self._staged)

    def _enqueue(self) -> None:
        self.binding.enqueue()
        self._launch()

    def _launch(self) -> None:
        addresses = self.binding.addresses
        self._kernel.launch(
            self._stream,
            control=self._control.pointer,
            prediction=addresses["prediction"],
            latents=addresses["latents"],
            previous=self._previous.pointer,
            history=self._history.pointer,
            timestep=addresses["timestep"],
            size=self._size,
            guided=self.guided,
        )

    def _capture(self) -> None:
        try:
            self._graph = self._stream.capture(self._enqueue)
        except BackendError as error:
            self.graph_obstacle = str(error)
            warnings.warn(f"denoising runs without a CUDA graph: {error}", SdrtWarning, stacklevel=2)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            graph.close()

    def _stage(self, nbytes: int) -> PinnedBuffer:
        """Give host memory that the GPU no longer reads."""
        if self._staging is not None:
            self._staged.wait()
            if self._staging.nbytes >= nbytes:
                return self._staging
            staging, self._staging = self._staging, None
            staging.close()
        self._staging = PinnedBuffer(self._device, nbytes)
        return self._staging

    def _reserve(self, nbytes: int) -> Buffer:
        """Give memory of the GPU that no earlier request uses, or that this one uses after it in the stream."""
        if self._parameters is None or self._parameters.nbytes < nbytes:
            if self._parameters is not None:
                self._stream.synchronize()
                parameters, self._parameters = self._parameters, None
                parameters.close()
            self._parameters = Buffer(self._device, nbytes, "the sampler's table and noise")
        return self._parameters

    def close(self) -> None:
        """Free everything; the stream must be done with it."""
        with ExitStack() as stack:
            stack.callback(self._stack.close)
            for part in (self._parameters, self._staging, self._graph):
                if part is not None:
                    stack.callback(part.close)
            self._parameters = self._staging = self._graph = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
