"""`inference.proto`, read without protoc, against the descriptors in tritonclient, which protoc has made."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from sdrt.serve import grpc_messages

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import DescriptorProto

FILE = grpc_messages.read(files("sdrt.serve").joinpath("inference.proto").read_text(encoding="utf-8"))


def theirs(name: str) -> Any:
    """Give tritonclient's descriptor of a message or enum, by its name within the package."""
    for module in (service_pb2, model_config_pb2):
        described = module.DESCRIPTOR
        found = {**described.message_types_by_name, **described.enum_types_by_name}.get(name)
        if found is not None:
            return found
    raise AssertionError(f"tritonclient has no {name}")


def ours(name: str) -> Any:
    return grpc_messages.message_class(name).DESCRIPTOR


def facts(field: Any) -> tuple[Any, ...]:
    """What makes two fields the same on the wire and in JSON."""
    kind = field.message_type or field.enum_type
    choice = field.containing_oneof and field.containing_oneof.name
    return (
        field.number,
        field.type,
        field.is_repeated,
        kind and kind.full_name,
        choice,
        field.is_packed,
        field.json_name,
    )


def check(mine: Any, other: Any) -> None:
    for field in mine.fields:
        assert facts(field) == facts(other.fields_by_name[field.name]), field.full_name
    for nested in mine.nested_types:
        check(nested, other.nested_types_by_name[nested.name])
        assert nested.GetOptions().map_entry == other.nested_types_by_name[nested.name].GetOptions().map_entry
    for enum in mine.enum_types:
        check_enum(enum, other.enum_types_by_name[enum.name])


def check_enum(mine: Any, other: Any) -> None:
    assert [(value.name, value.number) for value in mine.values] == [
        (value.name, value.number) for value in other.values
    ]


@pytest.mark.parametrize("message", [each.name for each in FILE.message_type])
def test_a_message_is_tritons(message: str) -> None:
    assert ours(message).full_name == theirs(message).full_name
    check(ours(message), theirs(message))


def test_the_methods_are_tritons() -> None:
    (service,) = service_pb2.DESCRIPTOR.services_by_name.values()
    assert grpc_messages.SERVICE.full_name == service.full_name
    for method in grpc_messages.SERVICE.methods:
        other = service.methods_by_name[method.name]
        assert (method.input_type.full_name, method.output_type.full_name) == (
            other.input_type.full_name,
            other.output_type.full_name,
        )
        assert (method.client_streaming, method.server_streaming) == (other.client_streaming, other.server_streaming)


def test_nothing_is_left_out_in_reading() -> None:
    """Every declaration of the file is there: a line that reads like none would be one that is missing."""
    text = files("sdrt.serve").joinpath("inference.proto").read_text(encoding="utf-8")
    declared = [line for line in text.splitlines() if " = " in line and "syntax" not in line]
    assert len(declared) == sum(map(count, FILE.message_type)) + sum(len(enum.value) for enum in FILE.enum_type)
    assert len(FILE.service[0].method) == text.count("rpc ")


def count(message: DescriptorProto) -> int:
    """Fields and values that the text declares; those of a map's entries it does not."""
    nested = sum(map(count, (each for each in message.nested_type if not each.options.map_entry)))
    return len(message.field) + nested + sum(len(enum.value) for enum in message.enum_type)
