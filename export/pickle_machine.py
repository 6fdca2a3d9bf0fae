"""A pickle machine that can build plain data and descriptions of tensors, and do nothing else.

A pickle is a program: unpickling calls whatever it names. This interpreter walks the same instructions with no means
to import or to call anything; a call is answered with a description of what it would have made. Every global that is
named must be on a list besides, so that a file which tries something is refused by name, not read as if it were sound.
"""

from __future__ import annotations

import pickletools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from ..errors import CheckpointError, UnsafeCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_STORAGES: Final = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}

_HARMLESS: Final = re.compile(
    "|".join(
        (
            *(re.escape(name) for name in _STORAGES),
            r"collections\.(OrderedDict|defaultdict|Counter)",
            r"(__builtin__|builtins)\.(set|frozenset|dict|list|tuple|int|float|complex|bool|str|bytes|bytearray|object)",
            r"copy_?reg\._reconstructor",
            r"_codecs\.encode",
            r"numpy\.(dtype|ndarray)",
            r"numpy\._?core\.multiarray\.(scalar|_reconstruct)",
            r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter)",
            r"torch\.(Size|device|Tensor|float16|float32|float64|bfloat16|int32|int64)",
            r"torch\.nn\.parameter\.Parameter",
            r"torch\.nn\.modules\.container\.ParameterDict",
            r"(pytorch_)?lightning(\.pytorch)?\.callbacks(\.[A-Za-z_]+){1,2}",
            r"(pytorch_)?lightning(\.pytorch|\.fabric)?\.utilities\.(parsing|data)\.AttributeDict",
            r"argparse\.Namespace",
        )
    )
)
"""What checkpoints name that only hold data. None of it is ever looked up: the list decides what is suspicious."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class StorageDescription:
    """The flat run of bytes that a tensor lies in: the archive's member `key`, `count` elements."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class Description:
    """A tensor that a pickle describes: sizes, offset and strides in elements, unchecked."""

    storage: StorageDescription
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_NOT_A_PICKLE: Final = (ValueError, LookupError, TypeError, ArithmeticError, EOFError, AttributeError)
"""What pickletools and the stack machine run into when bytes are not a pickle."""


class _Opaque:
    """Some object of the training run that no one needs: a callback, a numpy number, a set."""


class _Mark:
    pass


class _MalformedError(Exception):
    """The pickle contradicts itself."""


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _MalformedError(f"a size is {value!r:.40}, which is not a whole number")
    return value


def _whole_tuple(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise _MalformedError(f"a shape is of type {type(value).__name__}")
    return tuple(_whole(number) for number in value)


class _Interpreter:
    """A pickle machine that builds plain data and descriptions of tensors, and can do nothing else."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data = data
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Walk the instructions up to STOP and return what they describe."""
        try:
            for opcode, argument, _ in pickletools.genops(self.data):
                if opcode.name == "STOP":
                    return self.stack.pop()
                handler = _HANDLERS.get(opcode.name)
                if handler is not None:
                    handler(self, argument)
                elif _LITERAL.fullmatch(opcode.name):
                    self.stack.append(argument)
                else:
                    self.refuse_instruction(opcode.name, argument)
        except CheckpointError:
            raise  # a ValueError too, and no accident
        except _MalformedError as error:
            raise CheckpointError(f"{self.where} is damaged: {error}") from None
        except _NOT_A_PICKLE as error:
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise CheckpointError(f"{self.where} is damaged: {reason}") from None
        raise CheckpointError(f"{self.where} is damaged: its pickle does not end")

    def refuse_instruction(self, name: str, argument: Any) -> None:
        if name == "INST":  # carries its global along
            self.check_global(str(argument).replace(" ", ".", 1))
        raise UnsafeCheckpointError(
            f"{self.where} holds the pickle instruction {name}, which PyTorch does not write: the file is refused"
        )

    def check_global(self, name: str) -> None:
        if not _HARMLESS.fullmatch(name):
            raise UnsafeCheckpointError(
                f"{self.where} names {name!r:.100}, which weights do not need and which may run code when the file is "
                "loaded: it is refused, and nothing in it was run; take the model as .safetensors"
            )

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while not isinstance(item := self.stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def global_(self, argument: Any) -> None:
        name = str(argument).replace(" ", ".", 1)
        self.check_global(name)
        self.stack.append(_Global(name))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        # Both come from our own stack, so a name fetched from the memo is known here like any other.
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnsafeCheckpointError(f"{self.where} names a global by something other than text: it is refused")
        self.global_(f"{module} {name}")

    def reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise UnsafeCheckpointError(f"{self.where} calls something that is not a named function: it is refused")
        self.stack.append(self.describe_call(function.name, arguments))

    def describe_call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Say what a call would have made, without making it."""
        if name == "collections.OrderedDict":
            pairs = arguments[0] if arguments else []
            return {_key(key): value for key, value in pairs}
        if name == "torch._utils._rebuild_parameter":
            return arguments[0]
        if name in {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}:
            storage, offset, shape, strides = arguments[:4]
            if not isinstance(storage, StorageDescription):
                raise _MalformedError("a tensor has no storage")
            return Description(storage, _whole(offset), _whole_tuple(shape), _whole_tuple(strides))
        return _Opaque()

    def persistent(self, _: Any) -> None:
        reference = self.stack.pop()
        if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] not in ("storage", b"storage"):
            raise _MalformedError("it refers to something that is not a storage")
        kind, key, count = reference[1], reference[2], reference[4]
        dtype = _STORAGES.get(kind.name) if isinstance(kind, _Global) else None
        if dtype is None or not isinstance(key, str):
            raise _MalformedError("it refers to a storage of no known kind")
        self.stack.append(StorageDescription(dtype, key, _whole(count)))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, _Opaque):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise _MalformedError("it sets items of something that is not a dict")
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, _Opaque):
            return
        if not isinstance(target, list):
            raise _MalformedError("it appends to something that is not a list")
        target.extend(items)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise _MalformedError("its stack runs empty")
        items = self.stack[-count:]
        self.stack[-count:] = [tuple(items)]


def _key(value: Any) -> Any:
    """Return what may stand as a key; nested tuples could take for ever to hash, so they are not kept."""
    return value if isinstance(value, (str, int, float, bytes, _Global, type(None))) else _Opaque()


def _set_two(machine: _Interpreter, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _remember(machine: _Interpreter, index: Any) -> None:
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


_LITERAL: Final = re.compile(r"BININT[12]?|LONG[14]|BINFLOAT|(SHORT_)?BIN(UNICODE|STRING|BYTES)|BIN(UNICODE|BYTES)8")

_HANDLERS: Final[Mapping[str, Callable[[_Interpreter, Any], object]]] = {
    "PROTO": lambda _machine, _: None,
    "FRAME": lambda _machine, _: None,
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_SET": lambda machine, _: machine.stack.append(_Opaque()),
    "MARK": lambda machine, _: machine.stack.append(_Mark()),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "ADDITEMS": lambda machine, _: machine.pop_to_mark(),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "SETITEM": _set_two,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "BINPUT": _remember,
    "LONG_BINPUT": _remember,
    "MEMOIZE": _remember,
    "BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "GLOBAL": lambda machine, argument: machine.global_(argument),
    "STACK_GLOBAL": lambda machine, argument: machine.stack_global(argument),
    "REDUCE": lambda machine, argument: machine.reduce(argument),
    "NEWOBJ": lambda machine, argument: machine.reduce(argument),
    "BUILD": lambda machine, _: machine.stack.pop(),  # an object's state: nothing that is kept has any
    "BINPERSID": lambda machine, argument: machine.persistent(argument),
}


def walk(data: bytes, where: str) -> Any:
    """Say what a pickle describes.

    Parameters
    ----------
    data
        The pickle.
    where
        What to call it in messages.

    Returns
    -------
    Any
        Dicts, lists, tuples, text, numbers, `Description` for tensors, and opaque objects for everything else.

    Raises
    ------
    UnsafeCheckpointError
        If it names a global that is not on the list, or holds an instruction that PyTorch does not write.
    CheckpointError
        If it is malformed.

    """
    return _Interpreter(data, where).run()


def pickle_lengths(data: bytes) -> Iterator[int]:
    """Yield where each of the pickles that follow one another ends; the last may have no end."""
    position = 0
    while position < len(data):
        try:
            ends = [place for opcode, _, place in pickletools.genops(data[position:]) if opcode.name == "STOP"]
        except _NOT_A_PICKLE:
            ends = []
        if not ends:
            yield len(data)
            return
        position += (ends[0] or 0) + 1
        yield position
