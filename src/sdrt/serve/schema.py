"""JSON of requests held against JSON Schema: the part of it that the served OpenAPI document uses."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Schema = dict[str, Any]

_SHOWN = 60


class SchemaError(Exception):
    """JSON that does not keep to its schema; `where` is the field, None for the whole."""

    def __init__(self, message: str, where: str | None, *, unknown: bool = False) -> None:
        super().__init__(message)
        self.where = where
        self.unknown = unknown


def read_json(body: bytes) -> Any:
    """Parse a body; JSON alone, so neither NaN nor infinity.

    Raises
    ------
    SchemaError
        It is no JSON, or nested beyond all measure.

    """
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise SchemaError("the body is nested too deeply: expected a JSON object", None) from None
    except ValueError as error:
        raise SchemaError(f"the body is no JSON ({error}): expected a JSON object", None) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def conform(schema: Schema, value: Any, where: str | None = None) -> Any:
    """Return a value as its schema has it, whole numbers as int.

    Parameters
    ----------
    schema
        With ``type``, one or a list; ``enum``; ``minimum`` and ``maximum``; ``maxLength`` and ``pattern``; of an array
        ``items``, ``minItems`` and ``maxItems``; and of an object ``properties``, ``required`` and
        ``additionalProperties``, the latter false.
    value
        From `read_json`.
    where
        The field that it is.

    Raises
    ------
    SchemaError
        It does not keep to the schema; the message names the field, what was found and what was expected.

    """
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    kind = next((kind for kind in kinds if _IS[kind](value)), None)
    what = where or "the body"
    if kind is None:
        raise SchemaError(f"{what} is {_show(value)}: expected {_describe(schema)}", where)
    if kind == "object":
        return _conform_object(schema, value, where)
    if kind == "array" and schema["minItems"] <= len(value) <= schema["maxItems"]:
        return [conform(schema["items"], item, f"{what}[{number}]") for number, item in enumerate(value)]
    if kind == "integer":
        value = int(value)
    if not _is_within(schema, value, kind):
        raise SchemaError(f"{what} is {_show(value)}: expected {_describe(schema)}", where)
    return value


def _conform_object(schema: Schema, value: Mapping[str, Any], where: str | None) -> dict[str, Any]:
    properties = schema["properties"]
    prefix = f"{where}." if where else ""
    for name in value:
        if name not in properties:
            expected = ", ".join(properties)
            raise SchemaError(f"unknown field {_show(name)}: expected {expected}", f"{prefix}{name}", unknown=True)
    for name in schema.get("required", ()):
        if name not in value:
            raise SchemaError(f"{prefix}{name} is missing: expected {_describe(properties[name])}", f"{prefix}{name}")
    return {name: conform(properties[name], item, f"{prefix}{name}") for name, item in value.items()}


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and math.isfinite(value))


_IS: Mapping[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and value == int(value),
    "number": _is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _is_within(schema: Schema, value: Any, kind: str) -> bool:
    if value is None:
        return True
    if "enum" in schema and value not in schema["enum"]:
        return False
    if kind in {"integer", "number"}:
        return bool(schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf))
    if kind == "array":  # one that was not gone through, having too few items or too many
        return False
    if kind == "string":
        fits = "pattern" not in schema or re.search(schema["pattern"], value) is not None
        return fits and len(value) <= schema.get("maxLength", math.inf)
    return True


def _describe(schema: Schema) -> str:
    """Say in words what a schema allows."""
    if "items" in schema:
        return f"an array of {schema['minItems']}, each {_describe(schema['items'])}"
    if "enum" in schema:
        return " or ".join(json.dumps(each) for each in schema["enum"] if each is not None)
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    names = {"integer": "a whole number", "number": "a number", "string": "a string", "boolean": "true or false"}
    text = " or ".join(names.get(kind, f"an {kind}") for kind in kinds if kind != "null")
    if "minimum" in schema and "maximum" in schema:
        return f"{text} from {schema['minimum']} to {schema['maximum']}"
    if "minimum" in schema:
        return f"{text} of at least {schema['minimum']}"
    if "maxLength" in schema:
        return f"{text} of at most {schema['maxLength']} characters"
    return text + (f" such as {schema['examples'][0]}" if "examples" in schema else "")


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
