"""The messages of the gRPC service, made of `inference.proto` when the server starts.

They live in a pool of their own: a program that has other code for the same messages, such as tritonclient's, can
import this as well.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

PROTO = "inference.proto"
_Field = descriptor_pb2.FieldDescriptorProto
_FIELD = re.compile(r"(repeated )?([\w.]+) (\w+) = (\d+);")
_MAP = re.compile(r"map<(\w+), (\w+)> (\w+) = (\d+);")
_VALUE = re.compile(r"(\w+) = (\d+);")
_METHOD = re.compile(r"rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\) \{\}")
_SCALARS = {
    name: getattr(_Field, f"TYPE_{name.upper()}")
    for name in ("bool", "bytes", "double", "float", "int32", "int64", "string", "uint32", "uint64")
}


def read(text: str) -> descriptor_pb2.FileDescriptorProto:
    """Read a file in the protocol buffers language, as far as `inference.proto` uses it: one declaration a line."""
    lines = (line.partition("//")[0].strip() for line in text.splitlines())
    filled = (line for line in lines if line)
    file = descriptor_pb2.FileDescriptorProto(name=PROTO)
    for line in filled:
        word, _, rest = line.partition(" ")
        name = rest.rstrip(" {;")
        if word == "syntax":
            file.syntax = name.partition('"')[2].rstrip('"')
        elif word == "package":
            file.package = name
        elif word == "service":
            _read_service(file.service.add(name=name), filled)
        elif word == "message":
            _read_message(file.message_type.add(name=name), filled)
        elif word == "enum":
            _read_enum(file.enum_type.add(name=name), filled)
    return file


def _read_service(service: descriptor_pb2.ServiceDescriptorProto, lines: Iterator[str]) -> None:
    while match := _METHOD.fullmatch(next(lines)):
        name, client_streams, given, server_streams, answer = match.groups()
        service.method.add(
            name=name,
            input_type=given,
            output_type=answer,
            client_streaming=bool(client_streams),
            server_streaming=bool(server_streams),
        )


def _read_enum(enum: descriptor_pb2.EnumDescriptorProto, lines: Iterator[str]) -> None:
    while match := _VALUE.fullmatch(next(lines)):
        enum.value.add(name=match[1], number=int(match[2]))


def _read_message(message: descriptor_pb2.DescriptorProto, lines: Iterator[str]) -> None:
    choice: int | None = None
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "message":
            _read_message(message.nested_type.add(name=rest.rstrip(" {")), lines)
        elif word == "enum":
            _read_enum(message.enum_type.add(name=rest.rstrip(" {")), lines)
        elif word == "oneof":
            choice = len(message.oneof_decl)
            message.oneof_decl.add(name=rest.rstrip(" {"))
        elif line != "}":
            field = _read_field(message, line)
            if choice is not None:
                field.oneof_index = choice
        elif choice is None:
            return
        else:
            choice = None


def _read_field(message: descriptor_pb2.DescriptorProto, line: str) -> descriptor_pb2.FieldDescriptorProto:
    if match := _MAP.fullmatch(line):
        key, value, name, number = match.groups()
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        for position, (each, kind) in enumerate((("key", key), ("value", value)), 1):
            _set_kind(entry.field.add(name=each, number=position, label=_Field.LABEL_OPTIONAL), kind)
        field = message.field.add(name=name, number=int(number), label=_Field.LABEL_REPEATED)
        _set_kind(field, entry.name)
        return field
    match = _FIELD.fullmatch(line)
    assert match, line
    repeated, kind, name, number = match.groups()
    label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    field = message.field.add(name=name, number=int(number), label=label)
    _set_kind(field, kind)
    return field


def _set_kind(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type_name = kind  # a message or an enum: the pool finds out which


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(read(files(__package__).joinpath(PROTO).read_text(encoding="utf-8")))
SERVICE: Any = _POOL.FindServiceByName("inference.GRPCInferenceService")
"""Its methods, with the messages that they take and give."""


def message_class(name: str) -> type[Message]:
    """Give the class of a message by its name in the file, such as ``ModelInferRequest``."""
    found: type[Message] = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))
    return found
