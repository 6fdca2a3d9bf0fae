"""Steps of a loop on the GPU, whose latents and times are fetched when somebody looks at them."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .cuda import Buffer, Event

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from .cuda import Device, Stream


class Recording:
    """What happened in one request: each step's latents, and when it began and ended, kept on the GPU.

    It is freed with the last reference to it, which may be a step's, after the loop and the pipeline are gone.

    Parameters
    ----------
    device
        Where; its context is current.
    steps
        How many there will be.
    shape
        Of one step's latents.

    """

    def __init__(self, device: Device, steps: int, shape: tuple[int, ...]) -> None:
        self._device, self._shape = device, shape
        self._bytes = 4 * int(np.prod(shape))
        with ExitStack() as stack:
            stack.callback(device.retain().release)
            # Before the first step's there is what it set out from.
            self._latents = stack.enter_context(Buffer(device, self._bytes * (1 + steps), "the latents of every step"))
            self._began, self._ended = (
                [stack.enter_context(Event(device)) for _ in range(steps)] for _ in ("began", "ended")
            )
            self._finalizer = weakref.finalize(self, stack.pop_all().close)
        self._finalizer.atexit = False  # the process's end frees it, and the driver may be gone by then

    @property
    def pointer(self) -> int:
        """Where the latents are kept, those before the first step foremost."""
        return self._latents.pointer

    def mark_begin(self, stream: Stream, index: int) -> None:
        """Note that what is enqueued next is a step."""
        stream.record(self._began[index])

    def mark_end(self, stream: Stream, index: int) -> None:
        """Note that the step is all that was enqueued so far."""
        stream.record(self._ended[index])

    def wait(self, index: int) -> None:
        """Wait for a step."""
        with self._device.current():
            self._ended[index].wait()

    def latents(self, index: int) -> NDArray[np.float32]:
        """Wait for a step and copy its latents, read-only."""
        array = np.empty(self._shape, np.float32)
        self.wait(index)
        with self._device.current():
            source = self._latents.pointer + (1 + index) * self._bytes
            self._device.call("cuMemcpyDtoH", array.ctypes.data, source, self._bytes)
        array.flags.writeable = False
        return array

    def seconds(self, index: int) -> float:
        """Wait for a step and tell how long it took on the GPU."""
        self.wait(index)
        with self._device.current():
            return self._ended[index].seconds_since(self._began[index])


class DeviceStep:
    """One step, as `.loop.Step` has it; what has to be fetched from the GPU is when it is first asked for.

    Parameters
    ----------
    index, total, timestep
        As `.loop.Step` has them.
    recording
        Of its request.
    estimate
        Computes `estimate` of what is on the GPU once the step is done, and until the loop goes on.

    """

    def __init__(
        self,
        index: int,
        total: int,
        timestep: float,
        recording: Recording,
        estimate: Callable[[], NDArray[np.float32]],
    ) -> None:
        self.index = index
        self.total = total
        self.timestep = timestep
        self._recording = recording
        self._estimate: Callable[[], NDArray[np.float32]] | None = estimate

    @cached_property
    def latents(self) -> NDArray[np.float32]:
        """After the step: float32 of shape (N, 4, height / 8, width / 8), read-only; it stays valid."""
        return self._recording.latents(self.index)

    @cached_property
    def estimate(self) -> NDArray[np.float32]:
        """What the model takes for the finished latents at this step.

        Raises
        ------
        InputError
            The loop has gone on, and what it is made of is overwritten.

        """
        if self._estimate is None:
            raise InputError(f"the estimate of step {self.index} is gone: ask for it before the next step")
        self._recording.wait(self.index)
        return self._estimate()

    def expire(self) -> None:
        """Be told that the loop goes on."""
        self._estimate = None

    @cached_property
    def seconds(self) -> float:
        """What the step took on the GPU."""
        return self._recording.seconds(self.index)
