"""Between sdrt and programs that have their own arrays and streams on the same GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .device_array import DeviceArray, foreign
from .device_engines import result_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from .device_engines import DeviceEngines
    from .request import Request
    from .session import Passage

_ALIGNMENT = 256  # what TensorRT wants of its outputs


def hand_over(
    engines: DeviceEngines,
    request: Request,
    passages: Sequence[Passage],
    draw_noise: Callable[[], NDArray[np.float32]],
    *,
    images: bool,
    initial: Any,
    out: Any,
    stream: Any,
) -> DeviceArray:
    """Enqueue a request whose input, output or stream are another program's; `.pipeline.Pipeline.on_device` says how.

    Raises
    ------
    InputError
        An array or the stream cannot be used.
    BackendError
        The GPU failed, or has too little memory.

    """
    streams: set[int | None] = {None if stream is None else _stream_of(stream)}
    start = None
    if initial is not None:
        start, theirs = foreign("initial", initial, result_shape(request, images=False))
        streams.add(theirs)
    shape = result_shape(request, images=images)
    if out is None:
        return engines.generate(
            request, passages, draw_noise, images=images, streams=[*filter(None, streams)], initial=start
        )
    target, theirs = foreign("out", out, shape)
    if target % _ALIGNMENT:
        raise InputError(f"out begins at {target:#x}: expected a multiple of {_ALIGNMENT}")
    streams.add(theirs)
    arguments = request, passages, draw_noise, target
    engines.enqueue(*arguments, images=images, streams=[*filter(None, streams)], initial=start)
    with engines.device.current():
        return DeviceArray(engines.device, shape, place=(target, out)).written_by(engines.stream)


def _stream_of(given: Any) -> int:
    handle = given
    if (protocol := getattr(given, "__cuda_stream__", None)) is not None:
        _, handle = protocol()
    if isinstance(handle, bool) or not isinstance(handle, int) or handle <= 0:
        raise InputError(
            f"stream is {given!r}: expected a CUDA stream as an integer other than 0, or an object with __cuda_stream__"
        )
    return handle
