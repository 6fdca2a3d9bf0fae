"""Arrays in the GPU's memory, handed to other libraries and taken from them without a copy."""

from __future__ import annotations

import ctypes
import math
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..errors import InputError
from .cuda import Buffer, Event

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .cuda import Device, Stream

_CUDA = 2  # kDLCUDA of DLPack
_CODES = {"i": 0, "u": 1, "f": 2}  # DLDataTypeCode
_LEGACY_STREAM = 1  # as both protocols count: 0 is ambiguous, 2 is the thread's own
_DO_NOT_WAIT = -1
_NAME = b"dltensor"


class DeviceArray:
    """A C-contiguous array in the GPU's memory, freed with the last reference to it or by `close`.

    PyTorch, CuPy, JAX and others take it as it is, through DLPack or ``__cuda_array_interface__``, and wait for what
    is still being computed in it, on the GPU. It outlives the pipeline that made it.

    Parameters
    ----------
    device
        Where; its context is current.
    shape, dtype
        As numpy has them.
    purpose
        What it is, where there is too little memory for it.
    place
        The address of memory that is somebody else's, and its owner, who is kept; by default the array has its own.

    Attributes
    ----------
    pointer
        Its address in the GPU's memory.
    shape, dtype
        As numpy has them.

    """

    def __init__(
        self,
        device: Device,
        shape: tuple[int, ...],
        dtype: Any = np.float32,
        *,
        purpose: str = "the result",
        place: tuple[int, Any] | None = None,
    ) -> None:
        self._device = device
        self.shape = shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._ready: Event | None = None
        self._stream: Stream | None = None
        self._events: list[Event] = []
        if place is None:
            buffer = Buffer(device, self.nbytes, purpose)
            self.pointer, self._owner = buffer.pointer, None
        else:
            buffer = None
            self.pointer, self._owner = place
        self._finalizer = weakref.finalize(self, _free, device.retain(), buffer, self._events)
        self._finalizer.atexit = False  # the process's end frees it, and the driver may be gone by then

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def written_by(self, stream: Stream) -> Self:
        """Note that all which `stream` holds by now has to be done before this array is read."""
        event = Event(self._device, timing=False)
        self._events.append(event)
        stream.record(event)
        self._ready, self._stream = event, stream
        return self

    def wait(self) -> None:
        """Let the host wait until the array is computed.

        Raises
        ------
        BackendError
            What should have computed it failed.

        """
        if self._ready is not None:
            with self._device.current():
                self._ready.wait()

    def numpy(self) -> NDArray[Any]:
        """Copy it to the host, when it is computed."""
        array = np.empty(self.shape, self.dtype)
        self.wait()
        with self._device.current():
            self._device.call("cuMemcpyDtoH", array.ctypes.data, self.pointer, self.nbytes)
        return array

    def close(self) -> None:
        """Free it now, whoever else may hold it. It must not be in use by the GPU."""
        self._finalizer()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        stream = self._stream
        if stream is not None and not stream.open:
            self.wait()  # once, and long since reached: closing a pipeline waits for its stream
            stream = None
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": stream.pointer if stream is not None else None,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, self._device.ordinal

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        if copy or dl_device not in {None, self.__dlpack_device__()}:
            raise BufferError("a DeviceArray is handed over where it is: copy it afterwards")
        if stream != _DO_NOT_WAIT and self._ready is not None:
            driver = self._device.driver
            with self._device.current():
                handle = driver.CUstream(_LEGACY_STREAM if stream is None else stream)
                self._device.call("cuStreamWaitEvent", handle, self._ready.handle, 0)
        return _capsule(self)


def _free(device: Device, buffer: Buffer | None, events: list[Event]) -> None:
    with ExitStack() as stack:
        stack.callback(device.release)
        if buffer is not None:
            stack.callback(buffer.close)
        for event in events:
            stack.callback(event.close)


def foreign(what: str, given: Any, shape: tuple[int, ...]) -> tuple[int, int | None]:
    """Take an array of another library's, on the GPU, through ``__cuda_array_interface__``.

    Parameters
    ----------
    what
        Its name in error messages.
    given
        The array.
    shape
        What its shape has to be.

    Returns
    -------
    tuple
        Its address and, if any, the stream that has to be waited for.

    Raises
    ------
    InputError
        It is not on a GPU, or not float32 in C order of that shape.

    """
    facts = getattr(given, "__cuda_array_interface__", None)
    if facts is None:
        raise InputError(f"{what} is {type(given).__name__}: expected an array with __cuda_array_interface__")
    if tuple(facts["shape"]) != shape:
        raise InputError(f"{what} has the shape {tuple(facts['shape'])}: expected {shape}")
    if facts["typestr"] != "<f4":
        raise InputError(f"{what} is of type {facts['typestr']}: expected float32, <f4")
    strides, expected = facts.get("strides"), tuple(4 * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if strides is not None and tuple(strides) != expected:
        raise InputError(f"{what} has the strides {tuple(strides)}: expected an array in C order")
    pointer, _ = facts["data"]
    return int(pointer), facts.get("stream")


# DLPack's structures and the capsule that carries them; https://dmlc.github.io/dlpack/latest/c_api.html


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_handed_out: dict[int, tuple[Any, ...]] = {}
"""What each capsule's consumer still uses, by the address of its structure: the array itself among it."""


@_Deleter  # type: ignore[untyped-decorator]  # ctypes' way to make a C function
def _delete(managed: Any) -> None:
    _handed_out.pop(ctypes.addressof(managed.contents), None)


# Prototypes of our own: the attributes of ctypes.pythonapi are shared with every other library.
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


# The capsule dies while this runs, so it comes as an address: an object would be counted, and die twice.
@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)  # type: ignore[untyped-decorator]  # ctypes' way to make a C function
def _forget(capsule: int) -> None:
    if _is_valid(capsule, _NAME):  # a consumer renames what it takes, and deletes it itself
        _handed_out.pop(_pointer_of(capsule, _NAME), None)


def _capsule(array: DeviceArray) -> object:
    sizes = (ctypes.c_int64 * len(array.shape))(*array.shape)
    managed = _Managed()
    device_type, device_id = array.__dlpack_device__()
    managed.tensor = _Tensor(
        array.pointer,
        device_type,
        device_id,
        len(array.shape),
        _CODES[array.dtype.kind],
        8 * array.dtype.itemsize,
        1,
        sizes,
        None,  # C order
        0,
    )
    managed.deleter = _delete
    address = ctypes.addressof(managed)
    _handed_out[address] = managed, sizes, array
    capsule: object = _new_capsule(address, _NAME, ctypes.cast(_forget, ctypes.c_void_p))
    return capsule
