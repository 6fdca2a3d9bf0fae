"""Memory that engines share for what they need while they run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from .cuda import Buffer

if TYPE_CHECKING:
    from .cuda import Device, Stream


class Workspace:
    """Memory for activations, shared by all that never runs at the same time: by all that one stream runs.

    Attributes
    ----------
    version
        Grows whenever the memory moves.

    """

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream
        self._buffer: Buffer | None = None
        self.version = 0

    def reserve(self, nbytes: int) -> Buffer:
        """Give memory of at least that size, the same as before if it is large enough.

        Raises
        ------
        DeviceMemoryError
            There is not enough.

        """
        if self._buffer is None or self._buffer.nbytes < nbytes:
            self.version += 1
            self.close()
            self._buffer = Buffer(self._device, nbytes, "the engine's activations")
        return self._buffer

    def close(self) -> None:
        """Free it, when the stream is done with it."""
        if self._buffer is not None:
            buffer, self._buffer = self._buffer, None
            with ExitStack() as stack:
                stack.callback(buffer.close)
                self._stream.synchronize()
